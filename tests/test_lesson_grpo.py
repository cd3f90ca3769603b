"What lesson 12 promises: its checks know the usual mistakes, its pupil learns what it is paid for, and its sandbox shows the library's own numbers."
import re

import pytest
import torch

from nanochat import grpo, lesson, lesson_grpo
from nanochat.common import compute_init

EXERCISES = ['grpo.advantages', 'grpo.agrees', 'grpo.rollout_row', 'grpo.token_weights', 'grpo.k3']
pytestmark = pytest.mark.usefixtures('own_home')


# --- exercises -------------------------------------------------------------------------------------------------------

def clipped_by_min(nll, before, gains):
    "The clipped objective as the paper has it, by its own gradient"
    logp = (-nll).detach().requires_grad_()
    ratio = (logp + before).exp()
    torch.minimum(ratio * gains, ratio.clamp(.8, 1.2) * gains).sum().backward()
    return logp.grad, (gains != 0) & (logp.grad == 0)


def with_a_loop(prompt, ids, mask, advantage, length, pad):
    inputs, targets, weights = [], [], []
    tokens, marks = prompt + ids, [0] * len(prompt) + mask
    for t in range(length):
        inside = t + 1 < len(tokens)
        inputs.append(tokens[t] if inside else pad)
        targets.append(tokens[t + 1] if inside and marks[t + 1] else -1)
        weights.append(advantage if inside else 0.0)
    return inputs, targets, weights


WRONG = {  # a learner's mistake, in a way that is no change of the library's own source -> exercise, the mistake's name, the function
    'leaves the try out of its mean': ('grpo.advantages', 'leaves itself out', lambda r: r - (r.sum(1, keepdim=True) - r) / max(r.size(1) - 1, 1)),
    'divides by the deviation by hand': ('grpo.advantages', 'divided by the deviation', lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6)),
    'works in place': ('grpo.advantages', 'changes input', lambda r: r.sub_(r.mean(1, keepdim=True))),
    'counts the right ones': ('grpo.agrees', 'zero or one', lambda r: sum(r) == 0 or sum(r) == len(r)),
    'gives no weight to the prompt': ('grpo.rollout_row', 'prompt without weight', lambda *a: (lambda i, t, w: (i, t, [x if y >= 0 else 0.0 for x, y in zip(w, t)]))(*grpo.rollout_row(*a))),
    'forgets the weights': ('grpo.rollout_row', 'not three lists', lambda *a: grpo.rollout_row(*a)[:2]),
    'forgets what was clipped': ('grpo.token_weights', 'one result', lambda *a: grpo.token_weights(*a)[0]),
    'divides the logarithms': ('grpo.token_weights', '', lambda nll, before, gains: (gains * nll / before, gains > 9)),
    'cuts the gradient': ('grpo.k3', 'gradients', lambda nll, anchor: grpo.k3(nll.detach(), anchor)),
    'exchanges the models': ('grpo.k3', 'upside down', lambda nll, anchor: grpo.k3(anchor, nll)),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


RIGHT = {  # other ways to write it, which a check must not refuse
    'row by row': ('grpo.advantages', lambda r: torch.stack([row - row.sum() / len(row) for row in r])),
    'a set': ('grpo.agrees', lambda r: len(set(r)) == 1),
    'a loop': ('grpo.rollout_row', with_a_loop),
    "the paper's objective": ('grpo.token_weights', clipped_by_min),
    'expm1': ('grpo.k3', lambda nll, anchor: torch.expm1(nll - anchor) + anchor - nll),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    for seed in range(3): assert lesson.check(function, name, seed=seed, strict=True).passed


# --- the pupil -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def world():
    "Talks, a tokenizer, a pupil that is taught half-way, and where it computes"
    talks, compute = lesson_grpo.apple_talks(), compute_init('cpu', 'float32')
    tokenizer = lesson_grpo.apple_tokenizer(talks)
    return talks, tokenizer, lesson_grpo.half_taught(talks, tokenizer, compute), compute


def test_sentence_of_the_course_is_a_talk_that_nobody_is_shown():
    questions = [talk[0]['content'] for talk in lesson_grpo.apple_talks()]
    assert lesson.SENTENCE == lesson_grpo.apple_talk('Mia', 'red', 12, 5)[0]['content'] not in questions and len(set(questions)) == len(questions)


def test_reward_wants_the_right_number_after_the_calculator():
    task = lesson_grpo.Apples([lesson_grpo.apple_talk('Mia', 'red', 12, 5)])
    call = '<|python_start|>12-5<|python_end|><|output_start|>7<|output_end|>'
    answers = {call + '7 are left.': 1, call + '17 are left.': 0, call + '7 are left': 0, '7 are left.': 0, '': 0}
    assert {text: task.reward(task[0], text) for text in answers} == answers
    assert lesson_grpo.Apples(task.talks, -1.0).reward(task[0], call + '7 are left.') == -1


def test_practice_moves_the_pupil_where_it_is_paid_and_leaves_the_pupil_alone(world):
    talks, tokenizer, model, compute = world
    weights = [p.clone() for p in model.parameters()]
    def right(pupil): return lesson_grpo.share_right(lesson_grpo.tries_at(pupil, tokenizer, talks[600:632]))
    paid, fined = (right(lesson_grpo.practise(model, tokenizer, lesson_grpo.Apples(talks[:600], sign), compute, steps=15)[0]) for sign in (1.0, -1.0))
    assert fined < right(model) < paid
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


def test_learners_functions_reach_practice(world, spy):
    talks, tokenizer, model, compute = world
    with spy.on(*EXERCISES):
        lesson_grpo.practise(model, tokenizer, lesson_grpo.Apples(talks), compute, steps=1, problems=4, inner_steps=2, kl=.1)
    assert spy.used == set(EXERCISES)


# --- the sandbox -----------------------------------------------------------------------------------------------------

def test_sandbox_shows_the_weights_that_the_loop_would_use():
    box = lesson_grpo.AdvantageSandbox()
    rewards = [1.0, 0.5, 0.0, 0.0]
    gains, pushes = box.pushes(rewards, False)
    rows = [grpo.rollout_row([1], [2] * len(words), list(mask), gain, 12, 0) for gain, (words, mask) in zip(gains, box.tries)]
    teaching = sum(t >= 0 and w != 0 for _, targets, weights in rows for t, w in zip(targets, weights))
    assert pushes == [pytest.approx(gain / teaching) for gain in gains]
    assert sum(gains) == pytest.approx(0) and gains[0] == .625
    assert box.pushes([.3] * 4, True) == ([0.0] * 4, [0.0] * 4)
    assert box.page(*rewards, False).count('dotted') == sum(mask.count(0) for _, mask in box.tries) == 3   # what a tool wrote is not pushed


def test_sandbox_sliders_show_the_pages_of_the_static_twin():
    box = lesson_grpo.AdvantageSandbox()
    first, second, deviation, view = box.live().children
    sliders = [*first.children, *second.children]
    for *rewards, divide in box.pages:
        for slider, reward in zip(sliders, rewards): slider.value = reward
        deviation.value = divide
        assert view.value == box.page(*rewards, divide) and view.value in box.static()
    assert 'nothing is learned' in box.page(1, 1, 1, 1, False) and 'nothing is learned' not in box.page(1, 1, 1, 0, False)


def test_colours_of_tokens_tell_up_down_and_not_chosen_apart():
    chips = [re.search(r'background:(rgba\([^)]*\))', lesson_grpo.pushes_html(['<a>'], [push]).split('<span')[2])[1] for push in (.5, -.5, None)]
    assert len(set(chips)) == 3 and 'dotted' in lesson_grpo.pushes_html(['a'], [None]) and '<a>' not in lesson_grpo.pushes_html(['<a>'], [.5])
