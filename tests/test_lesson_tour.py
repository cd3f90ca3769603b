"Lesson 0: its small functions are the library's large ones, its checks name a beginner's mistakes, its widgets work on paper, and its stored run shows every stage."
import heapq
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import lesson, lesson_tour
from nanochat.engine import odds
from nanochat.gpt import GPT, GPTConfig
from nanochat.lesson_tour import AskBox, Snapshot, TimeLapse, chances, keep_likeliest, surprise, take_snapshot
from nanochat.tasks import words_of
from nanochat.tokenizer import Tokenizer

LESSON = Path(__file__).parent.parent / 'lessons' / '00_tour.ipynb'
pytestmark = pytest.mark.usefixtures('own_home')


# --- the functions ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('temperature,k', [(.3, 5), (1.0, 50), (2.5, 1), (.7, 20)])
def test_softmax_and_top_k_by_hand_are_the_engines_odds(temperature, k):
    scores = torch.randn(50, generator=torch.Generator().manual_seed(k)) * 3
    best, places = scores[None].topk(k)
    engine = odds(best, best[:, :1], np.array([[temperature, k, 1, 0]], np.float32))[0]
    mine = keep_likeliest(chances(scores.tolist(), temperature), k)
    assert torch.allclose(engine / engine.sum(), torch.tensor(mine)[places[0]], atol=1e-6)
    assert sum(p > 0 for p in mine) == k and abs(sum(mine) - 1) < 1e-9


def test_surprise_is_the_loss_of_the_model():
    torch.manual_seed(2)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=20, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    model.lm_head.weight.data.normal_()
    ids = torch.randint(20, (1, 9))
    p = model(ids[:, :-1])[0].softmax(-1)
    given = [row[i] for row, i in zip(p.tolist(), ids[0, 1:].tolist())]
    assert abs(surprise(given) - model(ids[:, :-1], ids[:, 1:]).item()) < 1e-5


# --- the checks ------------------------------------------------------------------------------------------------------

def naive(scores, temperature):
    weights = [math.exp(score / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


def only_kept(chances, k):
    kept = sorted(chances, reverse=True)[:k]
    return [p / sum(kept) for p in kept]


WRONG = {  # a beginner's mistake -> exercise, the mistake's name, the function
    'the plain softmax': ('lesson_tour.chances', 'too large', naive),
    'the temperature is forgotten': ('lesson_tour.chances', 'ignores the temperature', lambda scores, temperature: chances(scores, 1.0)),
    'shares of the scores': ('lesson_tour.chances', 'no powers', lambda scores, temperature: [s / temperature / sum(x / temperature for x in scores) for s in scores]),
    'weights instead of shares': ('lesson_tour.chances', 'sum is not one', lambda scores, temperature: [math.exp(s / temperature - 2000) * 2 for s in scores]),
    'the temperature as a factor': ('lesson_tour.chances', 'multiplies', lambda scores, temperature: chances([s * temperature for s in scores], 1.0)),
    'only the kept ones': ('lesson_tour.keep_likeliest', 'shorter', only_kept),
    'zeros and nothing else': ('lesson_tour.keep_likeliest', 'sum is not one', lambda chances, k: [p if p in sorted(chances)[-k:] else 0.0 for p in chances]),
    'everything as likely as the border': ('lesson_tour.keep_likeliest', 'keeps equals',
                                           lambda c, k: (lambda left: [p / sum(left) for p in left])([p if p >= sorted(c)[-min(k, len(c))] else 0.0 for p in c])),
    'a sum': ('lesson_tour.surprise', 'not a mean', lambda chances: -sum(map(math.log, chances))),
    'log of the mean': ('lesson_tour.surprise', 'mean first', lambda chances: -math.log(statistics.mean(chances))),
    'bits': ('lesson_tour.surprise', 'bits', lambda chances: statistics.mean(-math.log2(p) for p in chances)),
    'letters': ('tasks.contains_words', 'parts of words', lambda text, expected: bool(words_of(expected)) and expected.lower() in text.lower()),
    'letters, and no care for an empty answer': ('tasks.contains_words', 'parts of words', lambda text, expected: expected.lower() in text.lower()),
    'a set of words': ('tasks.contains_words', 'any order', lambda text, expected: bool(words_of(expected)) and not set(words_of(expected)) - set(words_of(text))),
    'no care for an empty answer': ('tasks.contains_words', 'nothing wanted', lambda text, expected: f' {" ".join(words_of(expected))} '.replace('  ', ' ') in f' {" ".join(words_of(text))} '.replace('  ', ' ')),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


RIGHT = {
    'torch': ('lesson_tour.chances', lambda scores, temperature: (torch.tensor(scores, dtype=torch.float64) / temperature).softmax(0).tolist()),
    'a heap': ('lesson_tour.keep_likeliest', lambda c, k: (lambda kept: [p / sum(c[i] for i in kept) if i in kept else 0 for i, p in enumerate(c)])(
        set(heapq.nsmallest(k, range(len(c)), key=lambda i: (-c[i], i))))),
    'the logarithm of a product': ('lesson_tour.surprise', lambda chances: -math.log(math.prod(chances)) / len(chances)),
    'padded strings': ('tasks.contains_words', lambda text, expected: bool(words_of(expected)) and f" {' '.join(words_of(expected))} " in f" {' '.join(words_of(text))} "),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    assert lesson.check(function, name, strict=True).passed


# --- the widgets -----------------------------------------------------------------------------------------------------

def ask_box(): return AskBox(lambda question, temperature, top_k: [f'<{question}> {temperature:g} {top_k}'], ['a & b', 'c'], (0.0, 1.0))
def time_lapse(): return TimeLapse('Who is "<b>"?', [Snapshot('step 0', '<i>', [('␣a', .25)]), Snapshot('step 9', 'Mia & Tom', [('"', .5), ('<', .125)])])


def test_time_lapse_slider_shows_the_pages_of_the_static_twin():
    lapse = time_lapse()
    controls, view = lapse.live().children
    for i in range(2):
        controls.children[1].value = i
        assert view.value == lesson_tour.snapshot_html(lapse.prompt, lapse.snapshots[i]) and view.value in lapse.static()


def test_ask_box_asks_again_when_the_question_or_a_dial_changes():
    question, dials, view = ask_box().live().children
    dials.children[0].value, dials.children[1].value = 1.5, 7
    assert '1.5 7' in view.value
    question.value = 'new one'
    assert 'new one' in view.value and 'a &amp; b' not in view.value


def test_snapshot_reads_the_model_and_leaves_it_as_it_was():
    tok = Tokenizer.train(['the cat sat on the mat'], 280)
    torch.manual_seed(1)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    assert take_snapshot(model, tok, [tok.bos], 'untrained').text.isprintable()   # it draws bytes at random
    model.lm_head.weight.data.normal_()
    prompt, before = [tok.bos, *tok.encode('the cat')], [p.clone() for p in model.parameters()]
    shot = take_snapshot(model, tok, prompt, 'now', max_tokens=9)
    assert shot == take_snapshot(model, tok, prompt, 'now', max_tokens=9) and shot.text.isprintable()
    p = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert [round(value, 5) for _, value in shot.likeliest] == [round(value, 5) for value in p.topk(5).values.tolist()]
    assert shot.likeliest[0][0] == lesson.printable(tok.decode_bytes([int(p.argmax())]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# --- the stored run --------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def outputs():
    "Every stored output's data, in order"
    return [o['data'] for c in json.loads(LESSON.read_text())['cells'] for o in c.get('outputs', []) if 'data' in o]


def test_stored_lesson_has_its_pictures(outputs):
    assert sum('image/png' in data for data in outputs) >= 5


def test_stored_time_lapse_goes_through_every_stage(outputs):
    text = next(''.join(data['text/plain']) for data in outputs if 'untrained, step 0' in ''.join(data['text/plain']))
    moments = re.findall(r'^  (\w+), step (\d+):', text, re.M)
    assert list(dict.fromkeys(stage for stage, _ in moments)) == ['untrained', 'reading', 'finetuning', 'reward']
    for stage in ('reading', 'finetuning', 'reward'):
        steps = [int(step) for name, step in moments if name == stage]
        assert steps == sorted(set(steps)) and len(steps) >= 2


def test_stored_report_card_gains_where_the_lesson_says_so(outputs):
    table = next(''.join(data['text/markdown']) for data in outputs if '| after |' in ''.join(data.get('text/markdown', '')))
    marks = {row[0]: [int(cell.rstrip('%')) for cell in row[1:]] for line in table.splitlines()[2:] if (row := [cell.strip() for cell in line.strip('| ').split('|')])[0]}
    assert list(marks) == ['untrained', 'read', 'finetuned', 'rewarded']
    assert marks['finetuned'][0] > marks['read'][0] + 30 and marks['rewarded'][1] > marks['finetuned'][1] and marks['rewarded'][2] > marks['read'][2]
