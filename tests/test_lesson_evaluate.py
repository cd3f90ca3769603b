"What lesson 7 promises: its checks know the usual mistakes, its world has scores that mean something, and its widgets show the library's own numbers."
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

from nanochat import core, evaluate, lesson, lesson_evaluate
from nanochat.common import Compute
from nanochat.dataloader import rows_to_batch
from nanochat.lesson_evaluate import BASELINES, SENTENCE_ITEM, ChoiceInspector, TaskBars, apple_item, apple_problem, bits_of_text, interval, little_world, losses_at, teach, verdicts_at, write
from nanochat.tasks import words_of
from nanochat.tokenizer import Tokenizer

EXERCISES = ['lesson_evaluate.bits_of_text', 'evaluate.reply_row', 'evaluate.likeliest', 'core.centered', 'evaluate.standard_error', 'evaluate.pass_at_k', 'evaluate.word_runs']
pytestmark = pytest.mark.usefixtures('own_home')


@pytest.fixture(scope='module')
def world(): return little_world()


@pytest.fixture(scope='module')
def tok(world): return Tokenizer.train(world.documents, 700)


@pytest.fixture(scope='module')
def model(world, tok): return teach(world, tok, 130)


# --- the library's parts ---------------------------------------------------------------------------------------------

def test_short_form_of_bits_per_byte_is_the_librarys():
    rng = random.Random(0)
    nats, sizes, ids = torch.rand(9, generator=torch.Generator().manual_seed(0)) * 4, [1, 2, 3, 4, 5, 6, 7, 0, 0], [rng.randrange(9) for _ in range(41)]
    def fixed(inputs, targets, reduction): return nats[targets.clamp(min=0)]
    library = core.bits_per_byte(fixed, [rows_to_batch([(ids, [1] * 41)])], sizes, Compute(torch.device('cpu'), torch.float32))
    assert bits_of_text([nats[i].item() for i in ids[1:]], [sizes[i] for i in ids[1:]]) == pytest.approx(library, rel=1e-5)


def test_reply_losses_are_those_of_each_reply_alone(model, tok):
    rows = [([tok.bos, *tok.encode(question)], tok.encode(reply)) for question, reply in (('Mia has', ' 12 red apples'), ('Tom has 10 green', ' apples'), ('A', ' coin: heads.'))]
    together = evaluate.reply_losses(model, rows, tok.bos)
    for (prompt, reply), losses in zip(rows, together):
        with torch.no_grad(): scores = model(torch.tensor([prompt + reply]))[0, len(prompt) - 1:-1]
        assert losses == pytest.approx(F.cross_entropy(scores, torch.tensor(reply), reduction='none').tolist(), abs=2e-4)


def test_choosing_replies_by_mean_or_sum_differs_only_where_lengths_do(model, tok, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, 'likeliest', lambda losses, mean: seen.append((losses, mean)) or 1)
    asked = [dict(messages=[dict(role='user', content='Mia has'), dict(role='assistant', content='')], letters=['a kite', 'a boat that is old'])]
    assert evaluate.choose_replies(model, tok, asked) == evaluate.choose_replies(model, tok, asked, mean=True) == ['a boat that is old']
    assert [mean for _, mean in seen] == [False, True] and [len(each) for each in seen[0][0]] == [len(tok.encode(reply)) + 1 for reply in asked[0]['letters']]   # the end counts


def test_paired_difference_by_hand_and_by_trial():
    gap, error = evaluate.paired_difference([True, True, False, True], [True, False, True, False])
    assert gap == .25 and error == pytest.approx(math.sqrt((.75 - .0625) / 4))
    assert evaluate.paired_difference([True] * 9, [False] * 9) == (1.0, 0.0)
    rng = random.Random(0)
    draws = [evaluate.paired_difference(*zip(*[(easy or rng.random() < .6, easy or rng.random() < .4) for easy in (rng.random() < .5 for _ in range(100))])) for _ in range(400)]
    mean = sum(gap for gap, _ in draws) / 400
    assert math.sqrt(sum((gap - mean)**2 for gap, _ in draws) / 400) == pytest.approx(sum(error for _, error in draws) / 400, rel=.15)
    with pytest.raises(lesson.NanochatError, match='same questions'): evaluate.paired_difference([True], [True, False])


@pytest.mark.parametrize('n,right,k', [(4, 1, 2), (5, 2, 3), (6, 0, 2), (6, 6, 2), (6, 5, 2), (7, 3, 7)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_try(n, right, k):
    draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert evaluate.pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_leaks_are_found_whatever_the_punctuation_and_nothing_else_is():
    question = 'Mia has 12 red apples and eats 5. How many apples are left?'   # 13 words
    assert evaluate.leaked([question, 'A question of its own, with words enough for a run of thirteen of them.'], ['… MIA has 12 red apples, and eats 5 -- how many apples are left'], 13) == [True, False]
    assert evaluate.leaked([question], ['Mia has 12 red apples', 'and eats 5. How many apples are left?']) == [False]   # a run does not cross documents
    assert evaluate.leaked([], ['text']) == evaluate.leaked([], []) == []


# --- exercises -------------------------------------------------------------------------------------------------------

def row_with_a_loop(prompt, reply, width, pad):
    tokens = (prompt + reply + [pad] * width)[:width]
    return tokens, [tokens[t + 1] if len(prompt) <= t + 1 < len(prompt) + len(reply) else -1 for t in range(width)]


def pass_by_product(n, right, k):
    wrong = 1.0
    for i in range(k): wrong *= max(n - right - i, 0) / (n - i)
    return 1.0 - wrong


WRONG = {  # a learner's mistake, in a way that is no change of the library's own source -> exercise, the mistake's name, the function
    'divides all losses': ('lesson_evaluate.bits_of_text', 'special tokens', lambda nats, sizes: sum(nats) / sum(sizes) / math.log(2)),
    'forgets the unit': ('lesson_evaluate.bits_of_text', 'nats', lambda nats, sizes: sum(l for l, s in zip(nats, sizes) if s) / sum(sizes)),
    'targets are the tokens': ('evaluate.reply_row', 'one late', lambda p, r, width, pad: (row_with_a_loop(p, r, width, pad)[0], ([-1] * len(p) + r + [-1] * width)[:width])),
    'returns one list': ('evaluate.reply_row', 'not two lists', lambda p, r, width, pad: row_with_a_loop(p, r, width, pad)[0]),
    'does not fill the targets': ('evaluate.reply_row', 'length', lambda p, r, width, pad: (row_with_a_loop(p, r, width, pad)[0], [-1] * (len(p) - 1) + r)),
    'adds only': ('evaluate.likeliest', 'length not normalised', lambda losses, mean: min(range(len(losses)), key=lambda i: sum(losses[i]))),
    'mixes units': ('core.centered', 'percent as a fraction', lambda a, b: (b - a) / (b - 1)),
    'subtracts': ('core.centered', 'only subtracted', lambda a, b: a - b / 100),
    'divides by n': ('evaluate.standard_error', 'n outside of the root', lambda p, n: (p * (1 - p))**.5 / n),
    'tries again and again': ('evaluate.pass_at_k', 'naive', lambda n, c, k: 1 - ((n - c) / n)**k),
    'keeps a list': ('evaluate.word_runs', 'a list', lambda text, size: [tuple(words_of(text)[i:i + size]) for i in range(len(words_of(text)) - size + 1)]),
    'joins the words': ('evaluate.word_runs', 'joined', lambda text, size: {' '.join(run) for run in evaluate.word_runs(text, size)}),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


RIGHT = {  # other ways to write it, which a check must not refuse
    'a loop over tokens': ('lesson_evaluate.bits_of_text', lambda nats, sizes: sum(l * (s > 0) for l, s in zip(nats, sizes)) / (sum(sizes) * math.log(2))),
    'by position': ('evaluate.reply_row', row_with_a_loop),
    'min by key': ('evaluate.likeliest', lambda losses, mean: min(range(len(losses)), key=lambda i: sum(losses[i]) / (len(losses[i]) if mean else 1))),
    'percent of percent': ('core.centered', lambda a, b: (100 * a - b) / (100 - b)),
    'a power': ('evaluate.standard_error', lambda p, n: ((p - p * p) / n)**.5),
    'factor by factor': ('evaluate.pass_at_k', pass_by_product),
    'zipped': ('evaluate.word_runs', lambda text, size: set(zip(*(words_of(text)[i:] for i in range(size))))),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    for seed in range(3): assert lesson.check(function, name, seed=seed, strict=True).passed


# --- the world and its exam ------------------------------------------------------------------------------------------

def test_sentence_of_the_course_is_a_question_that_no_text_holds(world):
    assert SENTENCE_ITEM['query'] == lesson.SENTENCE == apple_problem('Mia', 'red', 12, 5)[0] and SENTENCE_ITEM['choices'][SENTENCE_ITEM['gold']] == apple_problem('Mia', 'red', 12, 5)[1]
    text = ' '.join(world.documents)
    assert lesson.SENTENCE not in text and all(apple_problem(*problem)[0] not in text for problem in world.unseen)
    assert not any(one['query'] in text for one in world.exams['apples']) and little_world().documents == world.documents


def test_every_question_has_one_right_choice_and_guessing_gets_its_baseline(world):
    for task, items in world.exams.items():
        for one in items: assert len(set(one['choices'])) == len(one['choices']) == round(100 / BASELINES[task]) and 0 <= one['gold'] < len(one['choices'])
        assert abs(sum(one['gold'] == 0 for one in items) / len(items) - BASELINES[task] / 100) < .2   # the right one stands anywhere
    for one in world.exams['homes']: assert f"{one['query']} {one['choices'][one['gold']]}" in world.documents
    item = apple_item(('Mia', 'red', 15, 2), random.Random(0))
    assert item['choices'][item['gold']] == '13 are left.'


def test_verdicts_are_those_of_core_where_answers_begin_differently(world, tok, model):
    for task in ('homes', 'coins'):
        items = world.exams[task][:30]
        rows = [core.tokenize_prompts('multiple_choice', [f"{one['query']} {choice}" for choice in one['choices']], tok) for one in items]
        scores = core.score_items(model, rows, tok.bos, torch.device('cpu'))
        assert verdicts_at(model, tok, items) == [core.is_right('multiple_choice', each, one) for each, one in zip(scores, items)]


def test_batches_change_no_loss_and_training_moves_the_model(world, tok, model):
    items = world.exams['wishes'][:12]
    one, many = (losses_at(model, tok, items, rows=rows) for rows in (5, 256))
    assert all(a == pytest.approx(b, abs=2e-4) for x, y in zip(one, many) for a, b in zip(x, y))
    untrained = losses_at(teach(world, tok, 0), tok, items)
    assert untrained[0][0] == pytest.approx([math.log(tok.vocab_size)] * len(untrained[0][0]), abs=1e-3)
    assert sum(each[item['gold']][-1] for each, item in zip(many, items)) < sum(each[item['gold']][-1] for each, item in zip(untrained, items))


def test_verdicts_follow_the_sum_or_the_mean_as_asked(world, tok, model):
    items = world.exams['wishes']
    costs = [[(sum(each), sum(each) / len(each)) for each in losses] for losses in losses_at(model, tok, items)]
    by_sum, by_mean = ([min(range(4), key=lambda i: each[i][k]) == one['gold'] for each, one in zip(costs, items)] for k in (0, 1))
    assert verdicts_at(model, tok, items, False) == by_sum != by_mean == verdicts_at(model, tok, items)


def test_moments_of_one_training_are_those_of_shorter_trainings(world, tok):
    items = world.exams['coins'][:3]
    first, second = lesson_evaluate.teach_until(world, tok, (4, 6))
    assert losses_at(first, tok, items) == losses_at(teach(world, tok, 4), tok, items) != losses_at(second, tok, items) == losses_at(teach(world, tok, 6), tok, items)


def test_written_answers_end_where_the_document_ends(tok, model):
    [[text]] = write(model, tok, [lesson.SENTENCE])
    assert '<|bos|>' not in text and len(write(model, tok, ['Mia has'], 3, temperature=1.0)[0]) == 3


def test_learners_functions_reach_the_exam(world, tok, model, spy):
    plain = verdicts_at(model, tok, world.exams['homes'][:5])
    with spy.on('evaluate.reply_row', 'evaluate.likeliest', 'core.centered', 'evaluate.standard_error', 'evaluate.word_runs'):
        assert verdicts_at(model, tok, world.exams['homes'][:5]) == plain
        TaskBars(dict(homes=plain), BASELINES).bars(5, True)
        evaluate.leaked(['a b'], ['a b'], 2)
    assert spy.used == set(EXERCISES) - {'lesson_evaluate.bits_of_text', 'evaluate.pass_at_k'}   # those two the lesson calls by itself


# --- the widgets -----------------------------------------------------------------------------------------------------

def test_bars_shrink_their_intervals_and_centre_by_the_library():
    bars = TaskBars(dict(a=[True, True, True, False] * 100, b=[True, False] * 20), dict(a=25.0, b=50.0), counts=(4, 40, 400))
    assert bars.bars(400, False)['a'] == (.75, *interval(.75, 400), 400) and bars.bars(400, False)['b'][3] == 40
    widths = [high - low for n in bars.counts for _, low, high, _ in [bars.bars(n, False)['a']]]
    assert widths == sorted(widths, reverse=True) and widths[1] / widths[2] == pytest.approx(math.sqrt(10))
    assert bars.bars(40, True)['b'][0] == core.centered(.5, 50) == 0 and bars.bars(40, True)['a'][0] == pytest.approx(2 / 3)
    assert interval(.8, 100) == pytest.approx((.8 - .0784, .8 + .0784)) and interval(1.0, 5) == (1.0, 1.0)


def test_bars_slider_shows_the_pages_of_the_static_twin():
    bars = TaskBars({'<a>': [True, False, True] * 10}, {'<a>': 25.0}, counts=(5, 30))
    controls, view = bars.live().children
    for n, centred in bars.pages():
        controls.children[0].value, controls.children[1].value = n, centred
        assert view.value == bars.page(n, centred) and view.value in bars.static()
    assert controls.children[0].max == 30 and '<a>' not in bars.static()


def test_inspector_shows_both_winners_and_its_switch_shows_the_pages_of_the_static_twin():
    items = [dict(query='<b>', choices=['x y z', 'w'], gold=0), dict(query='q', choices=['u', 'v'], gold=1)]
    box = ChoiceInspector(items, [[[b'x', b' y', b'<'], [b'w']], [[b'u'], [b'v']]], [[[1.0, 1.0, 1.0], [2.0]], [[1.0], [2.0]]])
    assert [box.winner(*page) for page in box.pages()] == [1, 0, 0, 0]
    number, mean, view = box.live().children
    for i, by in box.pages():
        number.value, mean.value = i + 1, by
        assert view.value == box.page(i, by) and view.value in box.static()
    assert 'wrong' in box.page(0, False) and 'right</b>.' in box.page(0, True) and '<b>”' not in box.static() and '3.00' in box.page(0, False)
