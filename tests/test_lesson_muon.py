"""What lesson 5 promises: its checks know the usual mistakes, its widgets show the library's own numbers, and its plain steps are the library's."""
import re

import pytest
import torch

from nanochat import lesson, lesson_muon, muon
from nanochat.muon import AdamW, Muon, lr_multiplier, make_optimizers

EXERCISES = ['lesson_muon.nesterov', 'lesson_muon.adam', 'muon.newton_schulz', 'muon.group_of', 'muon.lr_multiplier']
pytestmark = pytest.mark.usefixtures('own_home')


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def product_dtype(request, monkeypatch):
    "The library's Newton–Schulz as it computes on either kind of processor"
    monkeypatch.setattr(muon, 'product_dtype', lambda device: request.param)


# --- exercises -------------------------------------------------------------------------------------------------------

def test_newton_schulz_is_checked_alike_on_processors_with_and_without_bfloat16(product_dtype):
    name = 'muon.newton_schulz'
    for seed in range(10): assert lesson.check(lesson_muon.simple_newton_schulz, name, seed=seed, strict=True).passed
    for mutant in lesson.exercises[name].mutants: assert lesson.check(lesson.mutated(name, mutant), name).mistake == mutant.name


def coefficients(a, b, c):
    def newton_schulz(G):
        X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            A = X @ X.mT
            X = a * X + b * A @ X + c * A @ A @ X
        return X
    return newton_schulz


def from_old_mean(grad, mean, keep):
    new = keep * mean + (1 - keep) * grad
    return new, keep * mean + (1 - keep) * grad


def floor_multiplier(step, num_steps):
    left, falling = num_steps - step, round(.2 * num_steps)
    return 1 if left >= falling else left // falling


WRONG = {  # a learner's mistake, in a way that is no change of the library's own source -> exercise, the mistake's name, the function
    'returns the direction alone': ('lesson_muon.nesterov', 'one result', lambda grad, mean, keep: lesson_muon.nesterov(grad, mean, keep)[1]),
    'looks ahead from the old mean': ('lesson_muon.nesterov', 'no look ahead', from_old_mean),
    'changes the mean that it got': ('lesson_muon.nesterov', 'changes input', lambda grad, mean, keep: (mean.mul_(keep).add_(grad, alpha=1 - keep), keep * mean + (1 - keep) * grad)),
    'multiplies by the root': ('lesson_muon.adam', '', lambda grad, mean, square, step, betas: (lambda m, s, d: (m, s, d * s))(*lesson_muon.adam(grad, mean, square, step, betas))),
    'returns no memories': ('lesson_muon.adam', 'direction only', lambda *given: lesson_muon.adam(*given)[2]),
    'counts steps from zero': ('lesson_muon.adam', 'steps from zero', lambda grad, mean, square, step, betas: lesson_muon.adam(grad, mean, square, step + 1, betas)),
    'has other coefficients': ('muon.newton_schulz', '', coefficients(3, -4, 2)),
    'decomposes': ('muon.newton_schulz', 'exact', lambda G: (lambda U, S, Vh: U @ Vh)(*torch.linalg.svd(G, full_matrices=False))),
    'only divides': ('muon.newton_schulz', '', lambda G: G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)),
    'leaves it on its side': ('muon.newton_schulz', 'turned', lambda G: coefficients(*muon.NEWTON_SCHULZ[0])(G).mT if G.ndim == 2 and G.shape[0] > G.shape[1] else coefficients(*muon.NEWTON_SCHULZ[0])(G)),
    'names the optimizer': ('muon.group_of', 'optimizer', lambda name, shape: 'Muon' if muon.group_of(name, shape) == 'matrices' else 'AdamW'),
    'forgets the blocks': ('muon.group_of', 'block kinds', lambda name, shape: next((kind for beginning, kind in muon.KINDS.items() if name.startswith(beginning)), None)),
    'cuts off what is behind the point': ('muon.lr_multiplier', 'a cliff', floor_multiplier),
    'falls from the beginning': ('muon.lr_multiplier', 'falls from the start', lambda step, num_steps: 1 - step / num_steps),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


RIGHT = {  # other ways to write it, which a check must not refuse
    'lerp': ('lesson_muon.nesterov', lambda grad, mean, keep: (mean.lerp(grad, 1 - keep), grad.lerp(mean.lerp(grad, 1 - keep), keep))),
    'power of a half': ('lesson_muon.adam', lambda g, m, s, t, betas: (betas[0] * m + (1 - betas[0]) * g, betas[1] * s + (1 - betas[1]) * g * g,
        (betas[0] * m + (1 - betas[0]) * g) / (1 - betas[0]**t) / (((betas[1] * s + (1 - betas[1]) * g * g) / (1 - betas[1]**t))**.5 + 1e-10))),
    'without tricks': ('muon.newton_schulz', lesson_muon.simple_newton_schulz),
    'in float64': ('muon.newton_schulz', lambda G: lesson_muon.simple_newton_schulz(G.double()).to(G.dtype)),
    'a matrix at a time': ('muon.newton_schulz', lambda G: torch.stack([lesson_muon.simple_newton_schulz(g) for g in G]) if G.ndim == 3 else lesson_muon.simple_newton_schulz(G)),
    'asks for the sides': ('muon.group_of', lambda name, shape: ('matrices' if len(shape) == 2 and shape[0] > 15 and shape[1] > 15 else 'small') if '.h.' in name else
        [kind for beginning, kind in muon.KINDS.items() if name.startswith(beginning)][0]),
    'a minimum': ('muon.lr_multiplier', lambda step, num_steps: min(1.0, (num_steps - step) / (0.2 * num_steps))),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    assert lesson.check(function, name, strict=True).passed


# --- the rules and the library ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', [(8, 8), (24, 6), (6, 24)], ids=str)
@pytest.mark.parametrize('optimizer', [AdamW, Muon])
def test_plain_update_takes_the_librarys_steps(optimizer, shape, product_dtype):
    def walk():
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape))
        stepper = optimizer([p], lr=.05, weight_decay=.1)
        for _ in range(6):
            p.grad = torch.randn(shape)
            stepper.step()
        return p.detach()
    library = walk()
    with lesson.swap(f'muon.{optimizer.__name__}.update', getattr(lesson_muon, f'{optimizer.__name__.lower()}_update')): plain = walk()
    assert torch.allclose(plain, library, atol=1e-3)


def test_learners_functions_reach_the_optimizers_of_a_model(spy):
    ids = [1, 2, 3, 4, 5, 6, 7] * 20
    with lesson.swap('muon.AdamW.update', lesson_muon.adamw_update), lesson.swap('muon.Muon.update', lesson_muon.muon_update), \
         spy.on('lesson_muon.nesterov', 'lesson_muon.adam', 'muon.newton_schulz', 'muon.group_of'):
        lesson_muon.train_with(make_optimizers, ids, 8, steps=2, length=16)
    assert spy.used == set(EXERCISES) - {'muon.lr_multiplier'}


def test_little_model_repeats_itself_and_takes_schedule_and_seed():
    ids = [1, 2, 3, 4, 5, 6, 7] * 20
    def end(**options): return lesson_muon.train_with(make_optimizers, ids, 8, steps=6, length=16, **options)[1][-1]
    assert end() == end() and end() < 1.5 and end(seed=1) != end()
    first = [lesson_muon.train_with(make_optimizers, ids, 8, steps=0, length=16, seed=seed)[0].transformer.wte.weight for seed in (0, 1)]
    assert not torch.equal(*first)   # other first weights, too
    assert end(schedule=lambda step, steps: 0.0) > 2   # rates of 0: nothing is learned


def test_walk_on_a_bowl_by_hand_and_best_rate_leaves_out_what_explodes():
    bowl, start = lambda p: (p**2 * torch.tensor([1., 50.])).sum() / 2, torch.tensor([-4., 1.])
    path, losses = lesson_muon.descend(bowl, start, lesson_muon.sgd_rule, .02, 2)
    assert torch.allclose(path, torch.tensor([[-4., 1.], [-3.92, 0.], [-3.8416, 0.]]), atol=1e-5) and losses[0] == 33
    slower = lesson_muon.descend(bowl, start, lesson_muon.sgd_rule, .02, 1, lambda step, steps: .5)[0]
    assert torch.allclose(slower[1], torch.tensor([-3.96, .5]), atol=1e-5)
    assert lesson_muon.best_rate(bowl, start, lesson_muon.sgd_rule, 30) == 2**-5   # 2**-4 jumps out: above 2/50
    mercy = lambda step, steps: 1.0 if step < 5 else .25   # brings 0.08 back, after it was thrown out
    assert lesson_muon.best_rate(bowl, start, lesson_muon.sgd_rule, 30, mercy, (.08, .01)) == .01


# --- widgets ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def race(): return lesson_muon.OptimizerRace()


@pytest.fixture(scope='module')
def spectrum():
    torch.manual_seed(0)
    return lesson_muon.SingularValues(torch.randn(12, 8) @ torch.diag(torch.logspace(0, -2, 8)), steps=5)


def test_dots_are_the_singular_values_and_the_slider_shows_a_page(spectrum):
    for name, quintics in lesson_muon.POLYNOMIALS.items():
        for step in (0, 3, 5):
            values = torch.linalg.svdvals(muon.newton_schulz(spectrum.matrix, step, torch.float32, quintics))
            assert torch.allclose(torch.tensor(spectrum.lengths(name, step)).sort(descending=True).values, values, atol=1e-4)
    controls, view = spectrum.live().children
    name, step = controls.children
    assert view.value == spectrum.page('Muon', 0)
    step.value = 5
    assert view.value == spectrum.page('Muon', 5) and view.value in spectrum.static()
    name.value = 'classical'
    assert view.value == spectrum.page('classical', 5) and view.value in spectrum.static()


def test_race_is_run_by_the_rules_and_its_sliders_show_a_page(race):
    bowl, start = lesson_muon.race_bowl(45)
    path, losses = lesson_muon.descend(bowl, start, lesson_muon.adam_rule, race.rates[45]['Adam'], race.steps, lambda step, steps: lr_multiplier(step, steps, warmdown=1.0))
    assert race.run(45, race.rates[45])[1]['Adam'] == losses
    first, second, third, view = race.live().children
    (step, angle), sliders = first.children, {slider.description: slider for row in (second, third) for slider in row.children}
    assert view.value == race.page(0, 0)
    step.value = 8
    assert view.value == race.page(8, 0) and view.value in race.static()
    assert [len(points.split()) for points in re.findall('polyline points="([^"]*)"', view.value)] == [9] * 8   # four paths, four losses
    angle.value = 45
    for name, rate in race.rates[45].items(): sliders[name].value = rate
    assert view.value == race.page(8, 45) and view.value in race.static()


def test_turning_the_bowl_stops_adam_alone(race):
    straight, turned = ({name: losses[-1] for name, losses in race.run(angle, race.rates[angle])[1].items()} for angle in (0, 45))
    assert turned['Adam'] > 5 * straight['Adam']
    for name in ('SGD', 'momentum', 'Muon'): assert turned[name] < 2 * straight[name]
