"What reinforcement learning promises: the textbook's gradient under every switch, exact resuming, and the same steps in every process."
import math
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from nanochat import grpo
from nanochat.common import Compute, NanochatError, Run, compute_cleanup, compute_init
from nanochat.engine import Sample
from nanochat.gpt import GPT, GPTConfig
from nanochat.grpo import PolicyTrainer, RolloutLoader, advantages, k3, token_weights
from nanochat.muon import make_optimizers
from nanochat.tokenizer import Tokenizer
from nanochat.train import Trainer

ALONE = Compute(torch.device("cpu"), torch.float32)
V, END = 8, 0 # of the bigram model below
SWITCHES = dict(simple={}, deviation=dict(divide_by_deviation=True), fixed_length=dict(fixed_length=True), inner_steps=dict(inner_steps=3),
                no_clip=dict(inner_steps=3, clip=0.0), clip_high=dict(inner_steps=3, clip_high=0.5), kl=dict(kl=0.7),
                all=dict(divide_by_deviation=True, fixed_length=True, inner_steps=3, clip=0.1, clip_high=0.3, kl=0.4))
GROUPS = [ # (prompt, tries, rewards): lengths differ, a tool wrote the tokens with mask 0, the second group agrees
    ([1, 2], [Sample([3, 4, 5], [1, 1, 1]), Sample([6], [1]), Sample([3, 7, 2, 2], [1, 0, 0, 1]), Sample([4, 4], [1, 1])], [1.0, 0.0, 0.0, 0.0]),
    ([1, 3, 3], [Sample([2], [1]), Sample([5, 6], [1, 1]), Sample([5, 5, 5], [1, 1, 0]), Sample([7], [1])], [1.0, 1.0, 1.0, 1.0]),
    ([1, 5], [Sample([6, 6, 1, 2, 3], [1, 1, 0, 1, 1]), Sample([7, 2], [1, 0]), Sample([3, 3], [1, 1]), Sample([2, 4, 6], [0, 1, 1])], [0.0, 1.0, 1.0, 0.0])]


class Bigram(nn.Module):
    "The smallest policy, in float64: the next token depends on the last one"
    def __init__(self, seed=0):
        super().__init__()
        self.config, self.table = SimpleNamespace(sequence_len=12), nn.Parameter(torch.randn(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))

    def forward(self, idx, targets, weights=None, reduction="mean"):
        nll = -self.table.log_softmax(1)[idx].gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
        if weights is not None: nll = nll * weights
        return nll.sum() if reduction == "sum" else nll


def fixed_trainer(model, groups=GROUPS, compute=ALONE, divide_by_deviation=False, fixed_length=False, optimizers=(), **options):
    "A trainer whose tries are given"
    per_process = len(groups) // compute.world_size
    loader = RolloutLoader(model, SimpleNamespace(special={"<|assistant_end|>": END}), None, compute, len(groups), 4, 2 if per_process % 2 else 4, 12, 5, by_deviation=divide_by_deviation)
    loader.attempt = lambda count, turn=0: groups[compute.rank::compute.world_size][:count]
    divisor = len(groups) * 4 * 5 if fixed_length else 0
    return PolicyTrainer(model, list(optimizers), loader, None, compute, "rl", None, 10, grad_accum=loader.micro_batches, compile=False, divisor=divisor, **options)


def textbook(now, old, start, divide_by_deviation=False, fixed_length=False, inner_steps=1, clip=0.2, clip_high=0.0, kl=0.0):
    "The objective, to be minimised, by loops over groups, tries and tokens (arXiv 2402.03300, 2503.14476, 2503.20783)"
    gain_sum, distance_sum, tokens, chosen = 0.0, 0.0, 0, 0
    def p(table, last, token): return (table[last] - table[last].logsumexp(0))[token].exp()
    for prompt, tries, rewards in GROUPS:
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((r - mean)**2 for r in rewards) / len(rewards))
        for sample, reward in zip(tries, rewards):
            advantage = (reward - mean) / (deviation if divide_by_deviation and deviation else 1.0)
            last = prompt[-1]
            for token, mask in zip(sample.ids, sample.mask):
                if mask:
                    ratio = p(now, last, token) / p(old, last, token).detach()
                    far = p(start, last, token).detach() / p(now, last, token)
                    if inner_steps == 1: gain = advantage * p(now, last, token).log()
                    elif not clip: gain = advantage * ratio
                    else: gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + (clip_high or clip)) * advantage)
                    gain_sum, distance_sum, chosen, tokens = gain_sum + gain, distance_sum + far - far.log() - 1, chosen + 1, tokens + (deviation > 0)
                last = token
    return -gain_sum / (len(GROUPS) * 4 * 5 if fixed_length else tokens) + kl * distance_sum / chosen


def moved(table, seed, far=0.35):
    "The table after a step in some direction"
    return table.detach() + far * torch.randn(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def begun(trainer):
    "The micro-batches of a step, before its first inner step"
    batches = [trainer.loader.next_batch() for _ in range(trainer.grad_accum)]
    trainer.begin_tries(batches)
    return batches


def gradient_of(trainer, batches):
    "What one pass over the step's micro-batches leaves"
    trainer.model.zero_grad()
    trainer.fit_memory(batches, trainer.chosen)
    return trainer.model.table.grad


@pytest.mark.parametrize("pieces", [1, 2], ids=["whole", "in pieces"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_gradient_is_the_textbook_s_in_the_first_and_in_a_later_inner_step(switch, pieces):
    options, model = SWITCHES[switch], Bigram()
    trainer, start = fixed_trainer(model, **options), model.table.detach().clone()
    trainer.pieces = pieces
    old = moved(start, 1) # the stage has come some way already
    batches = begun(trainer)
    for trainer.inner, table in enumerate([old, moved(old, 2, 0.8)][:options.get("inner_steps", 1)]):
        model.table.data.copy_(table)
        wanted = nn.Parameter(table.clone())
        textbook(wanted, old, start, **options).backward()
        torch.testing.assert_close(gradient_of(trainer, batches), wanted.grad, atol=2e-7, rtol=1e-5)
        assert wanted.grad.abs().max() > 1e-2
    if "inner_steps" in options and options.get("clip", 0.2): assert 0.1 < trainer.seen[0] / trainer.seen[1] < 0.9, "the case must have tokens on both sides of the band"


def test_a_forced_token_and_the_prompt_get_no_gradient():
    model = Bigram()
    model.table.data.zero_()
    groups = [([1], [Sample([2, 3], [1, 0]), Sample([4], [1])], [1.0, 0.0])]
    trainer = fixed_trainer(model, groups * 2)
    trainer.loader.num_samples, trainer.loader.batch_size, trainer.grad_accum = 2, 4, 1
    grad = gradient_of(trainer, begun(trainer))
    assert (grad[2] == 0).all(), "what followed 2 was written by a tool"
    assert grad[1, 2] < 0 < grad[1, 4], "descent raises the rewarded token and lowers the other"


def test_advantages_compare_within_a_group_only():
    rewards = torch.tensor([[1.0, 0, 0, 0], [9.0, 5, 5, 5], [3.0, 3, 3, 3]])
    for by_deviation in (False, True):
        alone = torch.cat([advantages(row[None], by_deviation) for row in rewards])
        torch.testing.assert_close(advantages(rewards, by_deviation), alone)
        torch.testing.assert_close(alone.sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    assert advantages(rewards)[1, 0] == 3.0
    torch.testing.assert_close(alone.square().mean(1), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("clip, clip_high", [(0.2, 0.0), (0.2, 0.4), (0.0, 0.0), (0.05, 0.5), (0.0, 0.3)])
def test_token_weights_are_the_slope_of_the_clipped_objective(clip, clip_high):
    g = torch.Generator().manual_seed(1)
    before, nll, gains = (torch.randn(40, 30, generator=g, dtype=torch.float64) * scale for scale in (1, 1, 2))
    nll = (before + 0.4 * nll).requires_grad_()
    ratio, high = (before - nll).exp(), clip_high or clip or math.inf
    torch.minimum(ratio * gains, ratio.clamp(1 - (clip or math.inf), 1 + high) * gains).sum().backward()
    weights, clipped = token_weights(nll.detach(), before, gains, clip, clip_high)
    torch.testing.assert_close(-nll.grad, weights)
    assert bool(clipped.any()) == bool(clip or clip_high) and (weights[clipped] == 0).all()


def test_k3_is_the_distance_on_average_never_negative_and_pulls_back():
    now, start = (torch.randn(V, generator=torch.Generator().manual_seed(s), dtype=torch.float64).softmax(0) for s in (1, 2))
    nll = (-now.log()).requires_grad_()
    each = k3(nll, -start.log())
    assert (each >= 0).all()
    torch.testing.assert_close((now * each).sum(), (now * (now / start).log()).sum())
    each.sum().backward()
    assert ((nll.grad < 0) == (now > start)).all(), "descent must raise −log p of a token that has become likelier"


# --- with a real model -----------------------------------------------------------------------------------------------

tokenizer = Tokenizer.train(["no merges: one token a byte"], 265)


class Letters:
    "Pays for an even sum of all letters; a third of the problems pays nothing at all"
    def __len__(self): return 50
    def __getitem__(self, i): return {"messages": [dict(role="user", content=f"{i:02d}?"), dict(role="assistant", content="a")], "number": i}
    def evaluate(self, conversation, completion): return conversation["number"] % 3 > 0 and sum(map(ord, completion)) % 2 == 0
    def reward(self, conversation, completion): return float(self.evaluate(conversation, completion))


def tiny_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=265, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    for p in model.parameters(): nn.init.normal_(p, std=0.2)
    return model


def letters_trainer(run, compute=ALONE, steps=6, model=None, resample=0, save_every=0, **options):
    model = model or tiny_model()
    loader = RolloutLoader(model, tokenizer, Letters(), compute, 4, 4, 4, 32, 6, seed=5, resample=resample)
    return PolicyTrainer(model, make_optimizers(model, 0.02, 0.02, 0.01), loader, run, compute, "rl", tokenizer, steps, grad_accum=loader.micro_batches, save_every=save_every, compile=False, **options)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path))
    return tmp_path


def test_the_first_inner_step_is_the_simple_form_to_the_last_bit(home):
    grads = []
    for options in ({}, dict(inner_steps=4), dict(inner_steps=2, clip=0.0)):
        trainer = letters_trainer(None, **options)
        loss = trainer.fit_memory(begun(trainer), trainer.chosen)
        grads.append([loss] + [p.grad for p in trainer.model.parameters()])
    for other in grads[1:]: assert all(torch.equal(a, b) for a, b in zip(grads[0], other))
    assert max(g.abs().max() for g in grads[0][1:]) > 0


def test_without_switches_it_is_the_loop_of_the_other_stages_on_weighted_rows(home):
    ours, plain = letters_trainer(Run.create("ours")), letters_trainer(Run.create("plain"))
    plain.__class__ = Trainer
    ours.fit(); plain.fit()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), plain.model.parameters()))
    assert not torch.equal(ours.model.lm_head.weight, tiny_model().lm_head.weight)


def test_the_default_draws_the_problems_and_the_noise_that_it_always_drew():
    loader = letters_trainer(None).loader
    order = torch.randperm(50, generator=torch.Generator().manual_seed(5)).tolist()
    for step in range(3):
        assert [p["number"] for p in loader.problems(4)] == order[4 * step:4 * step + 4]
        loader.step = step
        assert loader.sample_seed() == int.from_bytes(__import__("hashlib").sha256(f"5 {step} 0".encode()).digest()[:6], "big")
        assert loader.sample_seed(1) != loader.sample_seed()


EVERYTHING = dict(resample=2, inner_steps=3, kl=0.05, clip_high=0.3)

@pytest.mark.parametrize("options", [{}, dict(resample=2), EVERYTHING], ids=["simple", "resample", "everything"])
def test_a_run_that_was_stopped_ends_on_the_same_weights(home, options):
    straight = letters_trainer(Run.create("straight"), **options)
    straight.fit()
    first = letters_trainer(Run.create("stopped"), save_every=3, **options)
    first.train_step, steps = (lambda scale, real=first.train_step: steps.append(1) or (real(scale) if len(steps) < 5 else (_ for _ in ()).throw(KeyboardInterrupt))), []
    with pytest.raises(KeyboardInterrupt): first.fit()
    second = letters_trainer(Run.open("stopped"), **options)
    second.fit()
    assert second.started == 3
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), second.model.parameters()))
    if "resample" in options: assert second.loader.drawn == straight.loader.drawn > 6 * 4, "problems that were replaced must be remembered"


def test_a_checkpoint_from_before_the_switches_goes_on_where_it_was():
    loader = letters_trainer(None).loader
    loader.load_state_dict(dict(kind="rollouts", step=5, seed=3))
    assert loader.drawn == 20


def scripted(agreeing, resample, examples=4):
    "A loader whose problem number i agrees where the list says so; returns it and the counts asked for"
    loader, asked = letters_trainer(None, resample=resample).loader, []
    def attempt(count, turn=0):
        asked.append((count, turn))
        numbers = range(loader.drawn, loader.drawn + count)
        loader.drawn += count
        return [([1, 2], [Sample([3], [1])] * 4, [0.0] * 4 if agreeing[i] else [1.0, 0.0, 0.0, 0.0]) for i in numbers]
    loader.attempt = attempt
    return loader, asked


def test_groups_that_agree_are_replaced_within_bounds_and_counted():
    loader, asked = scripted([1, 0, 1, 1, 1, 0, 0, 1, 0, 0], resample=3)
    rows = loader.roll_out()
    assert asked == [(4, 0), (3, 1), (1, 2), (1, 3)] and loader.drawn == 9
    assert len(rows) == 16 and sum(max(targets) >= 0 for _, targets, _ in rows) == 16
    assert loader.metrics["replaced"] == 5 and loader.metrics["informative"] == pytest.approx(4 / 9)
    loader, asked = scripted([1] * 100, resample=2)
    rows = loader.roll_out()
    assert asked == [(4, 0), (4, 1), (4, 2)] and len(rows) == 16 and loader.metrics["informative"] == 0
    assert all(max(targets) == -1 for _, targets, _ in rows)
    loader, asked = scripted([1, 0, 1, 0], resample=0)
    assert len(loader.roll_out()) == 16 and asked == [(4, 0)] and "replaced" not in loader.metrics


def test_a_fractional_reward_that_all_share_teaches_nothing():
    loader, _ = scripted([0] * 4, resample=0)
    loader.attempt = lambda count, turn=0: [([1, 2], [Sample([3], [1])] * 10, [0.1] * 10)] * 4
    assert all(max(targets) == -1 for _, targets, _ in loader.roll_out())


def test_the_measures_are_what_their_names_say(home):
    model = Bigram()
    trainer = fixed_trainer(model, inner_steps=2, kl=0.5)
    start = model.table.detach().clone()
    model.table.data.copy_(moved(start, 1))
    def p(table, last, token): return float(table[last].log_softmax(0)[token])
    firsts = [(prompt[-1], tries[0]) for prompt, tries, _ in GROUPS]
    surprise = [-p(model.table.data, last, token) for last, s in firsts for last, token, mask in zip([last, *s.ids], s.ids, s.mask) if mask]
    far = [p(start, last, token) - p(model.table.data, last, token) for prompt, tries, _ in GROUPS for s in tries
           for last, token, mask in zip([prompt[-1], *s.ids], s.ids, s.mask) if mask]
    grpo.PolicyTrainer.train_step(trainer, 1.0)
    measured = trainer.loader.metrics
    assert measured["entropy"] == pytest.approx(sum(surprise) / len(surprise), rel=1e-5)
    assert measured["kl"] == pytest.approx(sum(math.exp(x) - x - 1 for x in far) / len(far), rel=1e-5)
    assert measured["length"] == pytest.approx(sum(len(s.ids) for _, tries, _ in GROUPS for s in tries) / 12)
    assert measured["reward"] == pytest.approx(7 / 12) and measured["informative"] == pytest.approx(2 / 3)
    assert measured["clipped"] == 0, "nothing moved between these two inner steps"
    assert trainer.step == 1 and trainer.loader.step == 1, "a step of the loop is one batch of tries"


@pytest.mark.parametrize("option, value", [("inner_steps", 0), ("kl", -0.1), ("clip", -0.2), ("clip_high", -1.0), ("resample", -1), ("kl", math.nan)])
def test_a_bad_switch_is_refused_in_one_line(home, option, value):
    with pytest.raises(NanochatError, match=option) as error: letters_trainer(None, **{option: value})
    assert "\n" not in str(error.value)


# --- several processes -----------------------------------------------------------------------------------------------

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def process(rank, world_size, port, folder, job):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NANOCHAT_HOME=folder)
    compute = compute_init("cpu", "float32")
    torch.set_num_threads(1)
    job(folder, compute)
    compute_cleanup()


def together(job, folder, world_size=2): mp.spawn(process, (world_size, free_port(), str(folder), job), nprocs=world_size)


def practise(folder, compute):
    "Six steps with every switch; each process writes down where it ended"
    run = Run.create("two") if compute.is_main else None
    compute.barrier()
    trainer, steps = letters_trainer(run or Run.open("two"), compute, **EVERYTHING), []
    real = grpo.Trainer.learn
    grpo.Trainer.learn = lambda self, batches, scale: steps.append(self.inner) or real(self, batches, scale)
    trainer.fit()
    torch.save(dict(weights=trainer.model.state_dict(), steps=steps, drawn=trainer.loader.drawn, metrics=trainer.loader.metrics), f"{folder}/rank{compute.rank}.pt")


def test_two_processes_take_the_same_steps_and_end_on_the_same_weights(tmp_path):
    together(practise, tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert one["steps"] == two["steps"] == [0, 1, 2] * 6
    assert one["drawn"] == two["drawn"] > 6 * 2 and one["metrics"] == two["metrics"]
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])


def union_step(folder, compute):
    "Two inner steps on given tries, dealt out over the processes, with plain descent"
    model = Bigram()
    trainer = fixed_trainer(model, GROUPS[::2] * 2, compute, divide_by_deviation=True, inner_steps=2, kl=0.3)
    trainer.model.table.data.copy_(moved(model.table, 1))
    batches = begun(trainer)
    for trainer.inner in range(2):
        trainer.fit_memory(batches, trainer.chosen)
        grad = compute.all_reduce(model.table.grad.clone()); model.zero_grad()
        model.table.data -= 2.0 * grad
    if compute.is_main: torch.save(model.table.data, f"{folder}/table{compute.world_size}.pt")


def test_two_processes_step_as_one_does(tmp_path):
    union_step(tmp_path, ALONE)
    together(union_step, tmp_path)
    one, two = (torch.load(tmp_path / f"table{n}.pt") for n in (1, 2))
    torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-7)
