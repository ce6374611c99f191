"""Mixtures in training: interrupted at any step, killed, on two processes, upcycled, with every router.

KILLS=5 kills a real process for every router, five times each; by default it is one router, twice."""
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from transformer_experiments.models.checkpoint import load_model
from transformer_experiments.models.moe_transformer import MoETransformer
from transformer_experiments.models.transformer import TransformerConfig, TransformerLanguageModel
from transformer_experiments.moe import load_balancing_loss, routing_stats
from transformer_experiments.moe.routing import ROUTERS
from transformer_experiments.tokenizers import CharacterTokenizer
from transformer_experiments.training import Recipe, Trainer
from transformer_experiments.training.mixtures import mixture_config, upcycled_recipe
from transformer_experiments.training.recipe import batch_at, recipe_from_dict
from transformer_experiments.training.evaluation import evaluate

KILLS = int(os.environ.get('KILLS', 0))
ENV = dict(os.environ, OMP_NUM_THREADS='1')
WORDS = 'thou art more lovely and temperate rough winds do shake the darling buds of may'.split()
TEXT = ' '.join(random.Random(0).choices(WORDS, k=1200))
TOKENIZER = CharacterTokenizer(TEXT)
SIZES = TransformerConfig(block_size=16, n_embed=16, n_head=2, n_layer=2, dropout=.1)
SMALL = Recipe(SIZES, max_steps=9, batch_size=8, micro_batch_size=4, warmup_steps=2, eval_every=4, checkpoint_every=2)


def recipe(router: str, **more) -> Recipe:
    return replace(SMALL, model=mixture_config(SIZES, 4, router=router, **more))


def trainer(folder: Path, r: Recipe, **more) -> Trainer:
    return Trainer(r, TEXT, TOKENIZER, folder, 'a refrain', **more)


def same_files(a: Path, b: Path):
    for name in ('model.safetensors', 'state.safetensors'):
        assert (a/name).read_bytes() == (b/name).read_bytes(), name


@pytest.mark.parametrize('router', ROUTERS)
def test_interrupted_at_any_step(router, tmp_path):
    "Stopped in the middle of three steps, gone on with: the same bytes, routers' health included."
    r = recipe(router, **(dict(capacity='switch', capacity_factor=.8) if router == 'top_k' else {}))
    whole = trainer(tmp_path/'whole', r)
    whole.train(progress=False)
    for stop in sorted(random.Random(router).sample(range(1, 9), 3)):
        cut = trainer(tmp_path/'cut', r, resume=True)
        plain = cut._micro_batch

        def interrupted(i, rows, cut=cut, stop=stop, plain=plain):
            if cut.step == stop and i == 1: raise KeyboardInterrupt
            return plain(i, rows)

        cut._micro_batch = interrupted
        with pytest.raises(KeyboardInterrupt):
            cut.train(progress=False)
    trainer(tmp_path/'cut', r, resume=True).train(progress=False)
    same_files(tmp_path/'cut', tmp_path/'whole')
    facts = load_model(tmp_path/'cut'/'model.safetensors').facts
    assert sorted(facts['health'], key=int) == ([] if router == 'soft' else ['4', '8', '9'])
    assert whole.evals[9] < whole.evals[4]


def test_health_is_counted_right(tmp_path):
    "The step's MaxVio, drops and dead experts against `routing_stats` of the same model on the same batch."
    r = replace(recipe('top_k', capacity='switch', capacity_factor=.7), eval_every=1, max_steps=3,
                model=replace(recipe('top_k', capacity='switch', capacity_factor=.7).model, dropout=0.))
    run = trainer(tmp_path/'run', r)
    twin = r.model.build(TOKENIZER.vocab_size)
    twin.load_state_dict(run.m.state_dict())
    assert isinstance(twin, MoETransformer)
    run._train_step()
    parts, seen = batch_at(r, run.train_data, 0)[:, :-1].split(4), []
    twin.watcher = seen.append
    twin.train()
    for part in parts:
        twin(part, part)
    stats = [routing_stats([s[i] for s in seen]) for i in range(2)]
    from transformer_experiments.training.routing_health import health_of_step
    found = health_of_step(run.routed)
    assert abs(found.max_vio - max(s.max_vio for s in stats)) < 1e-6
    assert abs(found.dropped - sum(s.drop_rate for s in stats) / 2) < 1e-6 and found.dropped > 0
    assert run.m.watcher is None # a model that was trained keeps no decisions
    assert found.dead == sum(int((s.load == 0).sum()) for s in stats)


@pytest.mark.parametrize('router', ('top_k', 'switch', 'noisy_top_k', 'scored'))
def test_balance_over_a_step(router, tmp_path):
    "With balance_over='step' the loss and the gradients of a step don't depend on how it is cut."
    losses_of = dict(balance_loss=1., z_loss=.1, balance_over='step')
    model = mixture_config(replace(SIZES, dropout=0.), 4, router=router, **losses_of)
    runs = [trainer(tmp_path/str(n), replace(SMALL, model=model, micro_batch_size=n, grad_clip=0.)) for n in (1, 8)]
    grads, losses = [], []
    for run in runs:
        rows = list(enumerate(batch_at(run.recipe, run.train_data, 0).split(run.recipe.micro_batch_size)))
        if router == 'noisy_top_k': # its noise is drawn for a micro-batch, so only the same cut can be compared
            rows = [(0, batch_at(run.recipe, run.train_data, 0))]
        run.m.train()
        with run._watched():
            losses.append(run._backward(rows).item())
        grads.append([p.grad.clone() for p in run.m.parameters()])
    assert abs(losses[0] - losses[1]) < 1e-5
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def test_balance_is_in_the_loss_of_a_step(tmp_path):
    "By the formula, over all tokens of the step."
    model = mixture_config(replace(SIZES, dropout=0.), 4, balance_loss=.5, balance_over='step')
    run = trainer(tmp_path/'run', replace(SMALL, model=model))
    rows = batch_at(run.recipe, run.train_data, 0)
    run.m.train()
    with run._watched():
        loss = run._backward(list(enumerate(rows.split(2))))
    with torch.no_grad():
        plain = TransformerLanguageModel.forward(run.m, rows[:, :-1], rows[:, 1:])[1]
        want = plain + .5 * load_balancing_loss(run.m.route(rows[:, :-1]))
    assert abs(loss.item() - want.item()) < 1e-5


@pytest.mark.parametrize('router', ('top_k', 'noisy_top_k', 'sigmoid_bias', 'hash', 'scored'))
def test_upcycled_starts_as_the_dense_model(router, tmp_path):
    torch.manual_seed(1)
    dense = SIZES.build(TOKENIZER.vocab_size)
    for p in dense.parameters():
        p.data.normal_(std=.2)
    k = dict(top_k=1) if router == 'hash' else {}
    r, start = upcycled_recipe(SMALL, dense, 4, router=router, **k)
    run = trainer(tmp_path/'run', r, start=start)
    assert abs(evaluate(run.m, run.val_data) - evaluate(dense, run.val_data)) < 1e-5
    run.train(progress=False)
    cut = trainer(tmp_path/'cut', replace(r, max_steps=9), start=start)
    plain = cut._micro_batch

    def interrupted(i, rows):
        if cut.step == 5: raise KeyboardInterrupt
        return plain(i, rows)

    cut._micro_batch = interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.train(progress=False)
    trainer(tmp_path/'cut', r, resume=True).train(progress=False) # without the dense model
    same_files(tmp_path/'cut', tmp_path/'run')


def test_older_recipes_and_what_is_refused(tmp_path):
    from dataclasses import asdict
    older = {k: v for k, v in asdict(recipe('top_k')).items() if k != 'start'}
    assert recipe_from_dict(older) == recipe('top_k')
    with pytest.raises(ValueError, match="start is the SHA-256 of weights"):
        replace(SMALL, start=None)
    with pytest.raises(ValueError, match="balance_over is 'call', 'step' or 'processes'"):
        mixture_config(SIZES, 4, balance_over='epoch')
    with pytest.raises(ValueError, match='got no model'):
        trainer(tmp_path/'none', replace(SMALL, start='0' * 64))
    assert not (tmp_path/'none').exists()


def command(text: Path, out: Path, *more: str) -> list[str]:
    main = 'from transformer_experiments.cli import main; main()'
    return [sys.executable, '-c', main, 'train', '--preset', 'quick', '--device', 'cpu', '--batch-size', '4',
            '--micro-batch-size', '2', '--eval-every', '10', '--checkpoint-every', '3', '--moe', '4',
            '--text', str(text), '--out', str(out), *more]


@pytest.mark.parametrize('router', ROUTERS if KILLS else ['sigmoid_bias'])
def test_kills_leave_no_trace(router, tmp_path):
    "A process is killed at random moments and the command goes on: the same bytes as without kills."
    (text := tmp_path/'text.txt').write_text(TEXT)
    settings = ['--steps', '60' if KILLS else '14', '--router', router]
    subprocess.run(command(text, tmp_path/'whole', *settings), env=ENV, check=True, capture_output=True)
    rng, kills, state = random.Random(1), 0, tmp_path/'cut'/'state.safetensors'
    for _ in range(KILLS or 2):
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        p = subprocess.Popen(command(text, tmp_path/'cut', *settings, '--resume'), env=ENV, **silent)
        began = state.stat().st_mtime_ns if state.exists() else None
        while p.poll() is None and (not state.exists() or state.stat().st_mtime_ns == began):
            time.sleep(.005)
        time.sleep(rng.uniform(0, .1))
        if p.poll() is not None: break
        p.kill()
        p.wait()
        kills += 1
    done = subprocess.run(command(text, tmp_path/'cut', *settings, '--resume'), env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and kills, (kills, done.stderr)
    same_files(tmp_path/'cut', tmp_path/'whole')
    for name in ('losses.png', 'routing.png') if router != 'soft' else ('losses.png',):
        assert (tmp_path/'cut'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes()


# Balanced by a loss: what two processes must count together. Noise is drawn by micro-batch, so it is the same on both.
TOGETHER = {'top_k': ['--balance-over', 'step'], 'sigmoid_bias': [], 'expert_choice': [], 'hash': [], 'switch': [],
            'noisy_top_k': [], 'scored': ['--balance-over', 'call'], 'soft': []}


@pytest.mark.parametrize('router', TOGETHER if KILLS else ['top_k'])
def test_two_processes_are_one(router, tmp_path):
    "The same micro-batches on one process and on two, dropout included: losses and routing health agree."
    (text := tmp_path/'text.txt').write_text(TEXT)
    settings = ['--steps', '8', '--dropout', '.1', '--router', router, *TOGETHER[router]]
    subprocess.run(command(text, tmp_path/'one', *settings), env=ENV, check=True, capture_output=True)
    (script := tmp_path/'run.py').write_text('from transformer_experiments.cli import main\nmain()\n')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script)]
    two = [*torchrun, *command(text, tmp_path/'two', *settings)[3:]]
    done = subprocess.run(two, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_model(tmp_path/n/'model.safetensors').facts for n in ('one', 'two'))
    assert max(abs(a - b) for a, b in zip(one['losses'], two['losses'], strict=True)) < 1e-4
    for step, health in one.get('health', {}).items():
        assert max(abs(a - b) for a, b in zip(health, two['health'][step], strict=True)) < .05
