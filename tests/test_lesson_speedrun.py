"What lesson 13 promises: its arithmetic is the library's, its checks know the usual mistakes, its dial shows the published sizes, and its records are there."
import json
import math
import re
from pathlib import Path

import pytest
import torch

from nanochat import common, lesson, lesson_speedrun as speed, preflight, report, train
from nanochat.gpt import GPT, GPTConfig

LESSON = Path(__file__).parent.parent / 'lessons' / '13_speedrun.ipynb'
pytestmark = pytest.mark.usefixtures('own_home')


# --- the napkin ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('depth,vocab_size', [(1, 300), (4, 1024), (12, 32768), (20, 65536), (30, 65536)])
def test_parameters_and_operations_of_the_napkin_are_those_of_the_model(depth, vocab_size):
    with torch.device('meta'): model = GPT(GPTConfig.from_depth(depth, vocab_size, 512))
    parameters = speed.count_parameters(depth, vocab_size)
    assert parameters == model.num_params()
    assert speed.training_work(parameters, depth, vocab_size, 512, 3) == (3 * parameters, 3 * parameters * model.flops_per_token())


def test_published_sizes_and_their_price():
    assert [speed.count_parameters(depth, 65536) for depth in (20, 26, 30, 32)] == [560_988_160, 1_081_999_360, 1_578_762_240, 1_879_048_192]
    tokens, operations = speed.training_work(560_988_160, 20, 65536, 2048, 20)
    hours, dollars = speed.time_and_money(operations, 8, 989e12, preflight.SHARE, 24)
    assert tokens // 2**19 == 21_400 and 2.5 < hours < 3.5 and dollars == pytest.approx(24 * hours)   # three of the four hours


@pytest.mark.parametrize('profile', ['speedrun', 'd26', 'd30'])
def test_memory_by_formula_is_that_of_the_walk_on_paper(profile):
    values = preflight.read_command('pretrain', ['--run', 'x', '--profile', profile])[1]
    trainer = preflight.walk('pretrain', values, 8, preflight.stand_in_tokenizer(65536), None, None)
    walked, formula = preflight.memory_parts(trainer), speed.napkin_memory(values['depth'], trainer.loader.batch_size, 8)
    assert walked.keys() == formula.keys()
    for part in walked: assert formula[part] == pytest.approx(walked[part], rel=1e-3), part


# --- exercises -------------------------------------------------------------------------------------------------------

count, work, money, fit, share, mean = ('lesson_speedrun.count_parameters', 'lesson_speedrun.training_work', 'lesson_speedrun.time_and_money', 'lesson_speedrun.fit_power', 'train.share_batch', 'report.mean_centered')

def mean_of_tasks(tasks):
    "The mean with the standard deviation of the tasks in place of the error"
    values = [t['centered'] for t in tasks.values()]
    return sum(values) / len(values), (sum((v - sum(values) / len(values))**2 for v in values) / len(values))**.5


WRONG = {  # a learner's mistake, in a way that is no change of the library's own source -> exercise, the mistake's name, the function
    'shares the tables': (count, 'one table', lambda depth, V: 64 * depth * V + 12 * depth * (64 * depth)**2),
    'forgets the layers': (count, 'one layer', lambda depth, V: 2 * 64 * depth * V + 12 * (64 * depth)**2),
    'counts three operations': (work, '', lambda N, L, V, T, r: (r * N, r * N * (3 * (N - V * 64 * L) + 12 * L * 64 * L * T))),
    'six for everything': (work, 'no attention', lambda N, L, V, T, r: (r * N, r * N * 6 * (N - V * 64 * L))),
    'exchanges tokens and work': (work, 'exchanged', lambda *a: speed.training_work(*a)[::-1]),
    'works with fractions': (work, 'not whole', lambda *a: tuple(map(float, speed.training_work(*a)))),
    'rents each GPU as a node': (money, 'price for each GPU', lambda o, g, p, s, d: (o / (g * p * s) / 3600, g * d * o / (g * p * s) / 3600)),
    'believes the leaflet': (money, 'at best', lambda o, g, p, s, d: (o / (g * p) / 3600, d * o / (g * p) / 3600)),
    'fits a plain line': (fit, 'no logarithms', speed.straight_line),
    'joins the ends': (fit, 'ends only', speed.ends_only),
    'exchanges a and b': (fit, 'exchanged', lambda x, y: speed.fit_power(x, y)[::-1]),
    'takes what fits': (share, 'rows stay', lambda total, fits, T, world: (fits, total // (fits * T * world))),
    'returns the rows': (share, 'one number', lambda *a: train.share_batch(*a)[0]),
    'divides by everybody once': (share, 'one for all', lambda total, fits, T, world: (max(1, min(fits, total // T)), total // (max(1, min(fits, total // T)) * T * world))),
    'forgets the error': (mean, 'mean alone', lambda tasks: report.mean_centered(tasks)[0]),
    'takes the spread of the tasks': (mean, '', mean_of_tasks),
    'works in place': (mean, 'changes input', lambda tasks: (report.mean_centered(tasks), tasks.clear())[0]),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


def with_torch(sizes, values):
    x, y = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(values, dtype=torch.float64).log()
    a, b = torch.linalg.lstsq(torch.stack([torch.ones_like(x), x], 1), y).solution.tolist()
    return math.exp(a), b


RIGHT = {  # other ways to write it, which a check must not refuse
    'part by part': (count, lambda depth, V: sum([V * 64 * depth] * 2 + [4 * (64 * depth)**2 + 2 * 64 * depth * 256 * depth] * depth)),
    'least squares': (fit, with_torch),
    'seconds first': (money, lambda o, g, p, s, d: ((t := o / g / p / s) / 3600, d * t / 3600)),
    'halving': (share, lambda total, fits, T, world: next((r, total // (r * T * world)) for r in range(fits, 0, -1) if r * T * world <= total or r == 1)),
    'one task after the other': (mean, lambda tasks: (sum(t['centered'] for t in tasks.values()) / len(tasks), math.sqrt(sum(t['accuracy'] * (1 - t['accuracy']) / t['n'] / (1 - t['baseline'])**2 for t in tasks.values())) / len(tasks))),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    for seed in range(3): assert lesson.check(function, name, seed=seed, strict=True).passed


def test_share_of_a_step_that_does_not_divide_is_refused_in_one_line():
    with pytest.raises(common.NanochatError, match='not a multiple'): train.share_batch(2**19, 32, 2048, 6)


# --- several processes -----------------------------------------------------------------------------------------------

IDS = [1, 2, 3, 4, 1, 3] * 60

def test_played_processes_train_like_one():
    curves = [speed.train_ranks(IDS, 8, world_size, fits, steps=10) for world_size, fits in ((1, 16), (1, 4), (2, 8), (4, 2))]
    for curve in curves[1:]: assert curve == pytest.approx(curves[0], abs=1e-3)
    assert curves[0][-1] < curves[0][0]


def test_learners_share_of_a_step_reaches_the_training_and_the_dial():
    calls = []
    def spy(*sizes): calls.append(sizes); return lesson.library('train.share_batch')(*sizes)
    with lesson.swap('train.share_batch', spy):
        speed.train_ranks(IDS, 8, 2, steps=1)
        speed.BudgetDial().page(20, 8, 3.0)
        preflight.walk('pretrain', preflight.read_command('pretrain', ['--run', 'x', '--profile', 'tiny'])[1], 1, preflight.stand_in_tokenizer(512), None, None)
    assert len(calls) == 3


# --- the dial --------------------------------------------------------------------------------------------------------

def test_dial_takes_the_batches_of_the_profiles():
    for name in ('speedrun', 'd26', 'd30'):
        base = common.load_profile(name)['stages']['base']
        assert speed.largest_batch(base['depth'], 8) == base['batch_size']


def test_more_gpus_are_sooner_and_not_dearer_and_depth_is_dear():
    one, eight, deep = speed.budget(20, 1, 3.0), speed.budget(20, 8, 3.0), speed.budget(40, 8, 3.0)
    assert one['hours'] == pytest.approx(8 * eight['hours']) and one['dollars'] == pytest.approx(eight['dollars']) and deep['dollars'] > 16 * eight['dollars']
    assert one['micro_batches'] * one['rows'] == 8 * eight['micro_batches'] * eight['rows'] == 256


def test_dial_sliders_show_the_pages_of_the_static_twin():
    dial = speed.BudgetDial()
    controls, view = dial.live().children
    for page in dial.pages:
        for control, value in zip(controls.children, page): control.value = value
        assert view.value == dial.page(*page) and view.value in dial.static()
    controls.children[0].value, controls.children[1].value = 48, 1
    assert 'too much' in view.value and 'not even one row' in view.value
    for depth in (1, 48):
        for gpus in (1, 256): assert dial.page(depth, gpus, 0.5)   # the ends of the sliders


# --- records ---------------------------------------------------------------------------------------------------------

def test_recorded_album_has_every_stage_and_the_courses_sentence():
    question, album = speed.recorded_album()
    assert question == lesson.SENTENCE and [shot.label for shot in album] == ['untrained', 'base', 'mid', 'sft', 'rl']
    assert all(len(shot.likeliest) == 5 and shot.text for shot in album)


def test_snapshots_of_a_run_ask_each_of_its_stages(tmp_path):
    from nanochat.checkpoint import save_checkpoint
    from nanochat.tokenizer import Tokenizer
    run = common.Run.create('little')
    tokenizer = Tokenizer.train(['Mia has apples. ' * 9], 300)
    tokenizer.save(run.path('tokenizer'))
    model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    for stage in ('base', 'sft'): save_checkpoint(run.path(stage), 1, model, [], dict(stage=stage), common.compute_init('cpu', 'float32'), tokenizer)
    assert [shot.label for shot in speed.stage_snapshots(run, 'Mia?')] == ['untrained', 'base', 'sft']


def test_journey_prefers_own_cards_and_fills_gaps_from_the_stored_lessons():
    lesson.story(1, 'my own card')
    lesson.story(13, 'the end')
    cards = speed.journey(13).cards
    assert 'Lesson 1: my own card' in cards and cards[-1] == 'Lesson 13: the end' and any(card.endswith('(from the stored lesson)') for card in cards)
    assert len({card.split(':')[0] for card in cards}) == len(cards)


def test_journey_passes_over_what_is_no_number_of_a_lesson():
    lesson.story(2, 'my own card')
    lesson.remember('story', 'bonus', text='of a fork')
    cards = speed.journey(13).cards
    assert 'Lesson 2: my own card' in cards and not any('of a fork' in card for card in cards)


def test_every_stored_lesson_has_a_card():
    for path in sorted(LESSON.parent.glob('[0-9]*.ipynb')): assert len(speed.stored_card(path)) > 20, path.name


# --- the lesson ------------------------------------------------------------------------------------------------------

def test_pages_that_the_lesson_sends_its_reader_to_exist():
    for link in re.findall(r'\]\((\.\./[\w/]+\.\w+)\)', LESSON.read_text()): assert (LESSON.parent / link).is_file(), link
    text = json.dumps(json.loads(LESSON.read_text()), ensure_ascii=False)
    for name in re.findall(r'`(nbs/\w+\.ipynb)`', text): assert (LESSON.parent.parent / name).is_file(), name
