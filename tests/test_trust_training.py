"""Training that can be trusted: what is stored is whole, and what can't work is said before it begins."""
import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrizations

from transformer_experiments.common.headers import sealed
from transformer_experiments.models.checkpoint import load_model, save_model
from transformer_experiments.models.transformer import TransformerConfig, TransformerLanguageModel
from transformer_experiments.tokenizers.char_tokenizer import CharacterTokenizer
from transformer_experiments.training.optimisers import Muon
from transformer_experiments.training.recipe import Recipe
from transformer_experiments.training.trainer import Trainer

TEXT = ''.join(random.Random(0).choices('abcdefgh ', k=600))
TOKENIZER = CharacterTokenizer(TEXT)
SMALL = Recipe(TransformerConfig(8, 12, 3, 1, 0.), max_steps=6, batch_size=4, micro_batch_size=4, eval_every=6,
               checkpoint_every=2, warmup_steps=2)


def trainer(folder: Path, recipe: Recipe = SMALL, resume: bool = False, text: str = TEXT) -> Trainer:
    return Trainer(recipe, text, TOKENIZER, folder, 'x', resume=resume)


def weights(t: Trainer) -> list:
    return [p.detach().clone() for p in t.m.parameters()]


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('part', ['whole', 'a block', 'both'])
def test_a_compiled_model_is_stored_by_its_own_names(tmp_path, part):
    m = TransformerLanguageModel(len(TOKENIZER.chars), config=SMALL.model)
    want = {k: v.clone() for k, v in m.state_dict().items()}
    if part != 'whole':
        m.blocks[0] = torch.compile(m.blocks[0], backend='eager')
    if part != 'a block':
        m = torch.compile(m, backend='eager')
    save_model(tmp_path/'m.safetensors', m, TOKENIZER, 'x')
    got = load_model(tmp_path/'m.safetensors').weights
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize('order', ['spread, then compiled', 'compiled, then spread'])
def test_a_model_of_several_processes_is_stored_by_its_own_names(tmp_path, order):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        m = TransformerLanguageModel(len(TOKENIZER.chars), config=SMALL.model)
        want = {k: v.clone() for k, v in m.state_dict().items()}
        wrap = [torch.nn.parallel.DistributedDataParallel, lambda m: torch.compile(m, backend='eager')]
        for wrapper in wrap if order.startswith('spread') else reversed(wrap):
            m = wrapper(m)
        save_model(tmp_path/'m.safetensors', m, TOKENIZER, 'x')
    finally:
        torch.distributed.destroy_process_group()
    got = load_model(tmp_path/'m.safetensors').weights
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_run_that_differs_in_more_than_its_length_is_refused_without_a_warning(tmp_path, recwarn):
    trainer(tmp_path/'run').train(progress=False)
    with pytest.raises(ValueError, match='^(?!.*max_steps).*lr is'):
        trainer(tmp_path/'run', replace(SMALL, max_steps=9, lr=1e-4), resume=True)
    assert not [w for w in recwarn if 'planned for' in str(w.message)]


def test_weights_that_the_configuration_does_not_have_are_refused_before_the_file_is_made(tmp_path):
    m = TransformerLanguageModel(len(TOKENIZER.chars), config=SMALL.model)
    parametrizations.weight_norm(m.lm_head)
    with pytest.raises(ValueError, match='lm_head'):
        save_model(tmp_path/'m.safetensors', m, TOKENIZER, 'x')
    with pytest.raises(ValueError, match='another shape'):
        save_model(tmp_path/'m.safetensors', TransformerLanguageModel(5, config=SMALL.model), TOKENIZER, 'x')
    assert not list(tmp_path.iterdir())


def test_without_clipping_is_with_a_clip_that_is_never_reached(tmp_path):
    runs = [trainer(tmp_path/str(i), replace(SMALL, grad_clip=clip)) for i, clip in enumerate((0, 0., 1e30, 1e-3))]
    for t in runs:
        t.train(progress=False)
    assert same(weights(runs[0]), weights(runs[1])) and same(weights(runs[0]), weights(runs[2]))
    assert not same(weights(runs[0]), weights(runs[3]))


BAD = [None, 'x', -1, -0.5, math.nan, math.inf, -math.inf, 2**70 + 0.5, [], True]


@pytest.mark.parametrize('field', [f.name for f in fields(Recipe)])
def test_a_recipe_refuses_what_it_cannot_mean(field):
    "Whatever is accepted is a value of the field's own kind, within its bounds."
    for value in BAD:
        try:
            made = replace(SMALL, **{field: value})
        except ValueError as e:
            assert field in str(e) or 'betas' in str(e), (field, value, str(e))
            continue
        assert (field, made and value) in [('seed', -1), ('lr', BAD[7]), ('muon_lr', BAD[7]), ('grad_clip', BAD[7]),
                                           ('weight_decay', BAD[7])]


@pytest.mark.parametrize('length, pct', [(5, 0.9), (9, 0.9), (20, 0.4), (20, 0.96), (0, 0.5)])
def test_text_that_is_too_short_leaves_nothing(tmp_path, length, pct):
    with pytest.raises(ValueError, match='split has .* tokens, fewer than'):
        trainer(tmp_path/'run', replace(SMALL, train_pct=pct), text=TEXT[:length])
    assert not (tmp_path/'run').exists()


def test_text_that_is_just_long_enough_is_trained_on(tmp_path):
    t = trainer(tmp_path/'run', replace(SMALL, train_pct=0.82), text=TEXT[:11]) # 9 = block_size + 1, and 2
    t.train(progress=False)
    assert math.isfinite(t.losses[-1]) and math.isfinite(t.evals[6])


@pytest.mark.parametrize('name', ['state.safetensors', 'model.safetensors'])
def test_a_flipped_bit_is_noticed(tmp_path, name):
    trainer(tmp_path/'run').train(progress=False)
    path, rng = tmp_path/'run'/name, random.Random(0)
    good = path.read_bytes()
    for _ in range(150):
        at = rng.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1:])
        with pytest.raises(ValueError, match=name): # by the file's name
            trainer(tmp_path/'run', resume=True) if name[0] == 's' else load_model(path)


def test_another_number_of_threads_and_a_damaged_timing_are_said(tmp_path):
    trainer(tmp_path/'run').train(progress=False)
    timing = tmp_path/'run'/'timing.json'
    timing.write_text(json.dumps(sealed(json.loads(timing.read_text()) | dict(threads=77))))
    with pytest.warns(UserWarning, match='77 threads'):
        trainer(tmp_path/'run', resume=True)
    flipped = timing.read_text().replace('77', '76')
    for damage in ('', '{', '[]', '{"seconds": null}', '{"seconds": "x", "threads": 2}', flipped):
        timing.write_text(damage)
        with pytest.warns(UserWarning, match='timing.json is damaged'):
            assert trainer(tmp_path/'run', resume=True).step == 6


def test_a_finished_run_goes_on_by_the_longer_schedule(tmp_path):
    trainer(tmp_path/'run').train(progress=False)
    longer = replace(SMALL, max_steps=9)
    with pytest.warns(UserWarning, match='planned for 6 steps and is at 6.*schedule of 9 steps'):
        t = trainer(tmp_path/'run', longer, resume=True)
    t.train(progress=False)
    # the same by hand: a run of nine steps' own schedule, put on the weights and averages of the sixth step
    (tmp_path/'hand').mkdir()
    trainer(tmp_path/'six').train(progress=False)
    hand = trainer(tmp_path/'hand', longer)
    six = trainer(tmp_path/'six', resume=True)
    hand.m.load_state_dict(six.m.state_dict())
    for mine, theirs in zip(hand.optimizers, six.optimizers, strict=True):
        state = theirs.state_dict()['state']
        mine.load_state_dict({**mine.state_dict(), 'state': state})
    hand.step = 6
    hand.train(progress=False)
    assert same(weights(t), weights(hand)) and len(t.losses) == 9
    facts = load_model(tmp_path/'run'/'model.safetensors').facts
    assert facts['extended'] == [[6, 6]] and facts['recipe']['max_steps'] == 9


@pytest.mark.parametrize('products', [torch.bfloat16, torch.float32])
def test_the_type_of_muons_products_is_kept_on_record_and_when_resumed(tmp_path, products, monkeypatch):
    from transformer_experiments.training import optimisers
    monkeypatch.setattr(optimisers, 'fast_products', lambda device: products)
    trainer(tmp_path/'whole').train(progress=False)
    cut, step = trainer(tmp_path/'cut'), Trainer._train_step
    def interrupted(self):
        if self.step == 4: raise KeyboardInterrupt
        return step(self)
    monkeypatch.setattr(Trainer, '_train_step', interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut.train(progress=False)
    monkeypatch.setattr(Trainer, '_train_step', step)
    other = torch.float32 if products is torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr(optimisers, 'fast_products', lambda device: other) # another machine goes on with it
    again = trainer(tmp_path/'cut', resume=True)
    again.train(progress=False)
    a, b = (load_model(tmp_path/name/'model.safetensors') for name in ('whole', 'cut'))
    assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    assert b.facts['products'] == str(products).removeprefix('torch.')


@pytest.mark.parametrize('shape', [(24, 12), (12, 24), (16, 16), (1, 5), (5, 1)])
@pytest.mark.parametrize('nesterov', [False, True])
def test_muon_is_torchs(shape, nesterov):
    "In bfloat16 to the last bit; in float32 as close as bfloat16's 8 bits allow."
    def after(make):
        torch.manual_seed(1)
        p = torch.nn.Parameter(torch.randn(shape))
        optimizer = make([p], lr=0.05, weight_decay=0.1, nesterov=nesterov, momentum=0.9)
        for _ in range(4):
            p.grad = torch.randn_like(p)
            optimizer.step()
        return p.detach()
    want = after(torch.optim.Muon)
    assert torch.equal(after(lambda ps, **o: Muon(ps, torch.bfloat16, **o)), want)
    torch.testing.assert_close(after(lambda ps, **o: Muon(ps, torch.float32, **o)), want, atol=0.02, rtol=0)
