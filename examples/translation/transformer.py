"""The transformer of fairseq's ``transformer_iwslt_de_en``, by torch's layers, and its search.

Normalization behind each block and none at the end, sinusoidal positions, the embedding of the target shared with the
output layer: a model with six and six layers has 30 normalization layers.
"""
import math
from dataclasses import dataclass

import torch
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

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """Embeddings with positions, (n, length, width)."""
        found = embedding(tokens) * math.sqrt(embedding.embedding_dim)
        return self.dropout(found + positions(tokens.shape[1], found))

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


@torch.no_grad()
def search(model: Transformer, source: Tensor, beam: int) -> tuple[list[list[int]], Tensor]:
    """Translations by beam search; ``beam`` 1 is greedy.

    Args:
        model: In evaluation mode.
        source: (n, S), padded.
        beam: How many are followed at the same time.

    Returns:
        Of each sentence the subwords of the translation with the highest log probability per subword, END among them
        and not returned, of at most 1.2 S + 10; and that score, (n,).
    """
    count, device = len(source), source.device
    memory, padding = (part.repeat_interleave(beam, 0) for part in model.encode(source))
    tokens = torch.full((count * beam, 1), BEGIN, device=device)
    # all beams begin alike, so only the first of each sentence may be continued at first
    total = torch.full((count, beam), -math.inf, device=device, dtype=memory.dtype)
    total[:, 0] = 0
    lengths = torch.zeros_like(total)
    done = torch.zeros(count, beam, dtype=torch.bool, device=device)
    first = torch.arange(count, device=device)[:, None] * beam
    for _ in range(int(1.2 * source.shape[1]) + 10):
        step = model.output(model.decode(memory, padding, tokens)[:, -1]).log_softmax(-1)
        step[:, [PAD, BEGIN]] = -math.inf
        step = step.view(count, beam, -1)
        step = step.masked_fill(done[..., None], -math.inf)
        step[..., PAD] = step[..., PAD].masked_fill(done, 0.0)  # one that is over goes on as it is
        total, at = (total[..., None] + step).flatten(1).topk(beam)
        parent, token = at // step.shape[-1], at % step.shape[-1]
        done, lengths = done.gather(1, parent), lengths.gather(1, parent)
        lengths = lengths + ~done
        done = done | (token == END)
        tokens = torch.cat([tokens[(first + parent).flatten()], token.view(-1, 1)], 1)
        if done.all():
            break
    score, best = (total / lengths).max(1)
    rows = tokens.view(count, beam, -1)[torch.arange(count, device=device), best, 1:].tolist()
    return [[token for token in row if token not in (END, PAD)] for row in rows], score
