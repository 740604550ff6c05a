"""The translation example: SAM on a model without timm, its masks and search, and a toy language that is learned."""
import copy
import csv
import json
import logging
import math

import pytest
import torch
from reference import sam_gradients
from support.models import flops
from support.running import in_process
from support.translation import LANGUAGES, TINY, data, examples, model_of, train, transformer, translated, write_toy

from timm_sam import SAM, select_parameters


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp('toy') / 'data')


# ---- selection, padding, masks

def test_selections_are_those_of_the_paper():
    for name, layers, tensors, count in (('iwslt_de_en', 30, 60, 30_720), ('small', 10, 20, 2_560)):
        with torch.device('meta'):
            model = transformer.Transformer(train.PRESETS[name]['size'], 8848, 0.1)
        chosen = select_parameters(model, 'onlynorm')
        assert (len(chosen), sum(p.numel() for _, p in chosen)) == (tensors, count) and tensors == 2 * layers
        everything = select_parameters(model, 'all')
        names = [name for name, _ in everything]
        assert ('embed_target.weight' in names) + ('output.weight' in names) == 1  # one matrix
        assert sum(p.numel() for _, p in everything) == sum(p.numel() for p in model.parameters())


def with_padding(batch, columns):
    return data.Batch(*(torch.nn.functional.pad(part, (0, columns), value=data.PAD)
                        for part in (batch.source, batch.target_in, batch.target_out)))


def sam_of(model, rho=0.1, **kwargs):
    return SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, params='onlynorm', rho=rho, **kwargs)


def eps_of(model, batch):
    sam = sam_of(model)
    with sam.ascent():
        loss = train.loss_of(model, batch, 0.1)
        loss.backward()
    before = [p.detach().clone() for _, p in sam.selected]
    with sam.perturbed():
        eps = [p.detach() - b for (_, p), b in zip(sam.selected, before)]
        train.loss_of(model, batch, 0.1).backward()
    return loss.item(), eps


def test_padding_changes_nothing():
    model, batch = model_of(), data.collate(examples())
    loss, eps = eps_of(model, batch)
    loss_padded, eps_padded = eps_of(model, with_padding(batch, 5))
    assert loss_padded == pytest.approx(loss, rel=1e-12)
    assert math.sqrt(sum(e.square().sum().item() for e in eps)) == pytest.approx(0.1, rel=1e-12)
    for e, padded in zip(eps, eps_padded):
        torch.testing.assert_close(padded, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize('params', ['all', 'onlynorm'])
@pytest.mark.parametrize('variant', ['sam', 'elementwise_l2_orig'])
def test_step_is_that_of_the_reference(params, variant):
    model, batch = model_of(), data.collate(examples())
    names = [name for name, _ in select_parameters(model, params)]
    twin = copy.deepcopy(model)
    found = sam_gradients(twin, lambda: train.loss_of(twin, batch, 0.1), names, variant, 0.1)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, params=params, rho=0.1, variant=variant)
    sam.backward(lambda: train.loss_of(model, batch, 0.1))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, found[-1][name], rtol=1e-9, atol=1e-12)


def test_output_depends_on_nothing_later_and_on_no_padding():
    model, batch = model_of(), with_padding(data.collate(examples(2)), 2)
    inputs = {}
    for name in ('embed_source', 'embed_target'):
        def keep(module, arguments, output, name=name):
            output.retain_grad()
            inputs[name] = output
        getattr(model, name).register_forward_hook(keep)
    at = 2
    model(batch.source, batch.target_in)[:, at].square().sum().backward()
    assert (inputs['embed_target'].grad[:, at + 1:] == 0).all()
    assert (inputs['embed_target'].grad[:, :at + 1].abs().amax(-1) > 0).all()
    padding = batch.source == data.PAD
    assert padding.any() and (inputs['embed_source'].grad[padding] == 0).all()
    assert (inputs['embed_source'].grad[~padding].abs().amax(-1) > 0).all()


# ---- updates

def options(*flags, size=TINY):
    args = train.parse_args(['nowhere', '--max-updates', '20', '--max-tokens', '40', '--warmup-updates', '5',
                             '--dropout', '0.1', *flags])
    args.size = size
    return args


def weights_after(*flags, dtype=torch.float64):
    args = options(*flags)
    model = model_of(dropout=args.dropout).to(dtype)
    run = train.Run(args, model, examples(12))
    torch.manual_seed(1)
    epoch = 0
    while run.done < run.total:
        list(run.epoch(epoch))
        epoch += 1
    return run, [p.detach().clone() for p in model.parameters()]


def test_without_sam_flags_it_is_a_plain_loop():
    _, found = weights_after(dtype=torch.float32)
    model, batches, args = model_of(dropout=0.1).float().train(), examples(12), options()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    torch.manual_seed(1)
    t = epoch = 0
    while t < 20:
        for rows in data.plan(batches, 40, seed=epoch)[:20 - t]:
            t += 1
            optimizer.param_groups[0]['lr'] = 1e-3 * min(t / 5, math.sqrt(5 / t))
            optimizer.zero_grad()
            train.loss_of(model, data.collate([batches[i] for i in rows]), args.label_smoothing).backward()
            optimizer.step()
        epoch += 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), found))


def test_radius_of_zero_is_plain_and_a_seed_is_one_run():
    _, plain = weights_after()
    run, zero = weights_after('--sam-variant', 'sam', '--sam-params', 'all', '--sam-rho', '0')
    assert isinstance(run.update, SAM)
    for p, q in zip(zero, plain):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    flags = ('--sam-variant', 'sam', '--sam-rho', '0.1')
    (_, once), (_, again) = weights_after(*flags), weights_after(*flags)
    assert all(torch.equal(p, q) for p, q in zip(once, again))
    assert not all(torch.equal(p, q) for p, q in zip(once, plain))
    _, partly = weights_after(*flags, '--sam-ascent-fraction', '0.5')
    assert not all(torch.equal(p, q) for p, q in zip(once, partly))


@pytest.mark.full
@pytest.mark.parametrize('flags', [[], ['--sam-params', 'all'], ['--sam-params', 'onlynorm']])
def test_loss_falls(flags, toy, tmp_path):
    """A smaller model; whether it translates, the slow test says."""
    args = options(*(['--sam-variant', 'sam', '--sam-rho', '0.05', *flags] if flags else []), '--lr', '0.01')
    texts = data.read(toy, 'train', 'xx', 'yy', False)
    vocabulary = data.Vocabulary.train([text for pair in texts for text in pair], 60, tmp_path / 'subwords.model')
    args.epochs, args.max_updates, args.max_tokens = 100, 40, 1000
    model = model_of(subwords=len(vocabulary), dropout=0.1).float()
    run, losses = train.Run(args, model, vocabulary.encode(texts)), []
    while run.done < run.total:
        losses += [loss.item() for loss in run.epoch(0)]
    assert len(losses) == 40 and sum(losses[-4:]) < 0.75 * sum(losses[:4])


def test_cost_is_that_of_linear_layers():
    model = transformer.Transformer(train.PRESETS['small']['size'], 200, 0.0)
    batch = data.collate(examples(8, subwords=200))

    def loss():
        return train.loss_of(model, batch, 0.1)

    unit = flops(lambda: loss().backward())
    ratio = {params: flops(lambda params=params: SAM(
        torch.optim.SGD(model.parameters(), lr=0.0), model, params=params, rho=0.1).minimize(loss)) / unit
        for params in ('all', 'onlynorm')}
    assert ratio['all'] == pytest.approx(2.0, abs=0.02)
    assert 1.6 < ratio['onlynorm'] <= 1.70


def test_learning_rate_rises_and_falls_with_the_root():
    rates = [train.rate(t, 1.0, 4) for t in range(16)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[15] == 0.5 and max(rates) == 1.0


# ---- search and score

def most(source):
    """How many subwords a search may find for a source, END among them."""
    return int(1.2 * int((source != data.PAD).sum())) + 10


def score_of(model, source, sentence):
    """Log probability per subword, END among them where the sentence is over."""
    words = [*sentence, data.END][:most(source)]
    logits = model(source, torch.tensor([[data.BEGIN, *sentence][:most(source)]]))[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(words)[:, None]).mean().item()


def greedily(model, source):
    """One subword after the other, as the definition has it."""
    tokens = [data.BEGIN]
    while len(tokens) <= most(source) and tokens[-1] != data.END:
        logits = model(source, torch.tensor([tokens]))[0, -1]
        logits[[data.PAD, data.BEGIN]] = -math.inf
        tokens.append(int(logits.argmax()))
    return [token for token in tokens[1:] if token != data.END]


@torch.no_grad()
def test_beam_of_one_is_greedy_and_five_are_better():
    model = model_of().eval()
    source = data.collate(examples(8)).source
    # a fresh model never ends: so END is about as likely as some subword that it likes
    model.output.weight[data.END] = 1.05 * model.output.weight[transformer.search(model, source, 1)[0][0][3]]
    greedy, scores = transformer.search(model, source, 1)
    better, best = transformer.search(model, source, 5)
    assert greedy == [greedily(model, row[None]) for row in source]
    assert any(len(sentence) < most(row) for row, sentence in zip(source, greedy))
    for found, said in ((greedy, scores), (better, best)):
        for i, sentence in enumerate(found):
            assert said[i].item() == pytest.approx(score_of(model, source[i:i + 1], sentence), abs=1e-9)
    assert (best >= scores - 1e-9).all() and (best > scores + 1e-9).any()


@torch.no_grad()
def test_places_one_by_one_are_the_model():
    model, batch = model_of().eval(), with_padding(data.collate(examples()), 2)
    decoder = transformer.Decoder(model, *model.encode(batch.source))
    found = torch.stack([decoder.next(tokens) for tokens in batch.target_in.T], 1)
    torch.testing.assert_close(found, model(batch.source, batch.target_in), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize('beam', [1, 3])
def test_translation_does_not_depend_on_what_is_beside_it(beam):
    model = model_of().eval()
    sources = [row.source[:n] for row, n in zip(examples(8), [6, 2, 4, 1, 6, 3, 5, 6])]
    batch = data.padded([[*source, data.END] for source in sources])
    model.output.weight[data.END] = 1.05 * model.output.weight[transformer.search(model, batch, 1)[0][0][3]]
    found, scores = transformer.search(model, batch, beam)
    assert len({len(sentence) for sentence in found}) > 3
    for i, source in enumerate(sources):
        alone, score = transformer.search(model, torch.tensor([[*source, data.END]]), beam)
        assert alone == [found[i]] and score.item() == pytest.approx(scores[i].item(), abs=1e-9)
        assert len(found[i]) <= int(1.2 * (len(source) + 1)) + 10


def test_references_have_the_best_score():
    lines = ['In the beginning, God created the heavens and the earth.', 'Light was there, and it was good.']
    score, signature = train.bleu(lines, lines, False)
    assert score == pytest.approx(100) and 'tok:13a' in signature and 'case:mixed' in signature
    score, signature = train.bleu([line.upper() for line in lines], lines, True)
    assert score == pytest.approx(100) and 'tok:none' in signature and 'case:lc' in signature


# ---- whole runs

@pytest.mark.slow
def test_toy_language_is_learned(toy, tmp_path):
    done = in_process(train.main, [
        str(toy), *LANGUAGES, '--max-updates', '300', '--epochs', '1000', '--warmup-updates', '50', '--lr', '0.002',
        '--max-tokens', '512', '--threads', '1', '--beam', '1', '--out', 'out'], tmp_path)
    assert done.code == 0, done.err
    sources, found = (path.read_text().splitlines() for path in (toy / 'test.xx', tmp_path / 'out' / 'test.txt'))
    assert len(sources) == 25
    assert sum(translated(source) == line for source, line in zip(sources, found)) >= 0.95 * len(sources)
    rows = list(csv.DictReader((tmp_path / 'out' / 'summary.csv').read_text().splitlines()))
    assert float(rows[-1]['train_loss']) < 0.5 * float(rows[0]['train_loss'])


@pytest.mark.full
def test_run_leaves_its_results(toy, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(train.PRESETS['small'], 'size', TINY)
    done = in_process(train.main, [str(toy), *LANGUAGES, '--epochs', '2', '--lowercase', '--tok-bleu', '--out', 'out',
                                   '--sam-variant', 'sam', '--sam-rho', '0.05'], tmp_path)
    assert done.code == 0, done.err
    assert 'SAM sam, rho=0.05, params=onlynorm: perturbs 10 of' in caplog.text
    lines = done.out.splitlines()
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert lines[-1] == f'test BLEU {result["test_bleu"]:.2f}' and lines[-2] == result['signature']
    assert 'tok:none' in result['signature'] and result['args']['seed'] == 0
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        'best.pt', 'result.json', 'subwords.model', 'summary.csv', 'test.txt'}
    assert len((tmp_path / 'out' / 'summary.csv').read_text().splitlines()) == 3
