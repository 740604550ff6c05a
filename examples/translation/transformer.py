"""The transformer of fairseq's ``transformer_iwslt_de_en``, by torch's layers, and its search.

Normalization behind each block and none at the end, sinusoidal positions, the embedding of the target shared with the
output layer: a model with six and six layers has 30 normalization layers.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from data import BEGIN, END, PAD
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Width, layers of encoder and of decoder each, width between, heads, subwords."""

    width: int
    layers: int
    between: int
    heads: int
    subwords: int


class Transformer(nn.Module):
    """From source and target so far to the logits of what follows.

    Args:
        size: Of the model.
        subwords: Rows of both embeddings.
        dropout: Of embeddings, attention and blocks.
    """

    def __init__(self, size: Size, subwords: int, dropout: float) -> None:
        super().__init__()
        width = size.width
        kwargs = dict(d_model=width, nhead=size.heads, dim_feedforward=size.between, dropout=dropout, batch_first=True)
        self.embed_source = nn.Embedding(subwords, width, padding_idx=PAD)
        self.embed_target = nn.Embedding(subwords, width, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**kwargs), size.layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**kwargs), size.layers)
        self.output = nn.Linear(width, subwords, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        for embed in (self.embed_source, self.embed_target):
            nn.init.normal_(embed.weight, std=width ** -0.5)
            nn.init.zeros_(embed.weight[PAD])
        self.output.weight = self.embed_target.weight

    def embed(self, embedding: nn.Embedding, tokens: Tensor, place: int = 0) -> Tensor:
        """Embeddings with positions, (n, length, width); the first token is at ``place``."""
        found = embedding(tokens) * math.sqrt(embedding.embedding_dim)
        return self.dropout(found + positions(place + tokens.shape[1], found)[place:])

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder attends to, (n, S, width), and where it is padding, (n, S)."""
        padding = source == PAD
        return self.encoder(self.embed(self.embed_source, source), src_key_padding_mask=padding), padding

    def decode(self, memory: Tensor, padding: Tensor, target: Tensor) -> Tensor:
        """What the output layer reads at each place of the target, (n, T, width).

        Padding of the target needs no mask: it is behind all places that count.
        """
        later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).triu(1)
        return self.decoder(self.embed(self.embed_target, target), memory, tgt_mask=later,
                            memory_key_padding_mask=padding)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of what follows each place of the target, (n, T, subwords)."""
        return self.output(self.decode(*self.encode(source), target))


def positions(length: int, like: Tensor) -> Tensor:
    """Sines and cosines of falling frequency, (length, width)."""
    half = like.shape[-1] // 2
    frequencies = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000) / max(1, half - 1)))
    angles = torch.arange(length, device=like.device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype)


def project(attention: nn.MultiheadAttention, x: Tensor, which: Sequence[int]) -> list[Tensor]:
    """Of queries 0, keys 1 and values 2 of (n, length, width) those asked for, (n, heads, length, width of a head)."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    return [F.linear(x, weights[i], biases[i]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for i in which]


def attend(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
           mask: Tensor | None = None) -> Tensor:
    """What the queries find, (n, length, width)."""
    found = F.scaled_dot_product_attention(query, key, value, mask)
    return attention.out_proj(found.transpose(1, 2).flatten(2))


class Decoder:
    """The decoder of a model in evaluation mode, one place after the other.

    Keys and values of the source and of earlier places are kept, so a place costs one place.

    Args:
        model: In evaluation mode.
        memory: (n, S, width), as of :meth:`Transformer.encode`.
        padding: (n, S), likewise.
    """

    def __init__(self, model: Transformer, memory: Tensor, padding: Tensor) -> None:
        self.model, self.place, self.layers = model, 0, model.decoder.layers
        self.not_padding = ~padding[:, None, None]
        self.source = [project(layer.multihead_attn, memory, (1, 2)) for layer in self.layers]
        self.earlier = [[keys[:, :, :0], values[:, :, :0]] for keys, values in self.source]

    def next(self, tokens: Tensor) -> Tensor:
        """Logits of what follows the tokens (n,), which are at the next place: (n, subwords)."""
        x = self.model.embed(self.model.embed_target, tokens[:, None], self.place)
        for i, layer in enumerate(self.layers):
            query, *here = project(layer.self_attn, x, (0, 1, 2))
            self.earlier[i] = [torch.cat(pair, 2) for pair in zip(self.earlier[i], here)]
            x = layer.norm1(x + attend(layer.self_attn, query, *self.earlier[i]))
            query, = project(layer.multihead_attn, x, (0,))
            x = layer.norm2(x + attend(layer.multihead_attn, query, *self.source[i], self.not_padding))
            x = layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))
        self.place += 1
        return self.model.output(x[:, 0])

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows in this order. Where none is left out, rows change places within a source only."""
        self.earlier = [[part[rows] for part in layer] for layer in self.earlier]
        if len(rows) < len(self.not_padding):
            self.source = [[part[rows] for part in layer] for layer in self.source]
            self.not_padding = self.not_padding[rows]


@torch.no_grad()
def search(model: Transformer, source: Tensor, beam: int) -> tuple[list[list[int]], Tensor]:
    """Translations by beam search; ``beam`` 1 is greedy.

    Args:
        model: In evaluation mode.
        source: (n, S), padded.
        beam: How many are followed at the same time.

    Returns:
        Of each sentence the subwords of the translation with the highest log probability per subword, END among them
        and not returned, of at most 1.2 times its own length + 10; and that score, (n,).
    """
    device = source.device
    limits = (1.2 * (source != PAD).sum(1)).int() + 10
    decoder = Decoder(model, *(part.repeat_interleave(beam, 0) for part in model.encode(source)))
    left = torch.arange(len(source), device=device)  # sentences that are not over
    tokens = torch.full((len(left), beam, 1), BEGIN, device=device)
    # all beams begin alike, so only the first of each sentence may be continued at first
    total = torch.full((len(left), beam), -math.inf, device=device, dtype=model.output.weight.dtype)
    total[:, 0] = 0
    lengths = torch.zeros_like(total)
    done = torch.zeros(len(left), beam, dtype=torch.bool, device=device)
    found: list[list[int]] = [[]] * len(left)
    scores = total.new_zeros(len(left))
    while len(left):
        step = decoder.next(tokens[..., -1].flatten()).log_softmax(-1)
        step[:, [PAD, BEGIN]] = -math.inf
        step = step.view(len(left), beam, -1)
        step = step.masked_fill(done[..., None], -math.inf)
        step[..., PAD] = step[..., PAD].masked_fill(done, 0.0)  # one that is over goes on as it is
        total, at = (total[..., None] + step).flatten(1).topk(beam)
        parent, token = at // step.shape[-1], at % step.shape[-1]
        done, lengths = done.gather(1, parent), lengths.gather(1, parent)
        lengths = lengths + ~done
        done = done | (token == END)
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand_as(tokens)), token[..., None]], 2)
        over = done.all(1) | (tokens.shape[2] > limits[left])
        for i in over.nonzero()[:, 0].tolist():
            scores[left[i]], best = (total[i] / lengths[i]).max(0)
            found[left[i]] = [word for word in tokens[i, best, 1:].tolist() if word not in (END, PAD)]
        rows = torch.arange(len(left), device=device)[:, None] * beam + parent
        decoder.keep(rows[~over].flatten())
        left, tokens, total, lengths, done = (part[~over] for part in (left, tokens, total, lengths, done))
    return found, scores
