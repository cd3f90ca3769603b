"Lesson 10: its short forms are the engine's, its checks name a beginner's mistakes, a learner's functions reach the engine, and its widgets show what was measured."
import random
import re

import numpy as np
import pytest
import torch

from nanochat import engine, lesson, lesson_engine
from nanochat.engine import Engine, odds, sample_key, uniform
from nanochat.gpt import GPT, GPTConfig
from nanochat.lesson_engine import GOLDEN, CacheFill, HalfFull, SamplingDials, noise, scatter, set_dials, simple_update, simple_walk
from nanochat.tokenizer import Tokenizer

EXERCISES = ['attention.KVCache.update', 'engine.odds', 'engine.walk', 'engine.penalise', 'lesson_engine.noise']
pytestmark = pytest.mark.usefixtures('own_home')


@pytest.fixture(scope='module')
def tok(): return Tokenizer.train(['the cat sat on the mat'], 270)


@pytest.fixture(scope='module')
def model(tok):
    torch.manual_seed(1)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)).eval()
    model.lm_head.weight.data.normal_()
    return model


# --- the short forms -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lengths', [[0], [3], [2, 2, 2], [4, 0, 1]], ids=str)
def test_simple_update_writes_what_the_library_writes(lengths):
    ours, theirs = (HalfFull(lengths, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    k, v = torch.randn(2, len(lengths), 2, 2, 2)
    simple_update(ours, 1, k, v)
    theirs.update(1, k, v)
    assert torch.equal(ours.k, theirs.k) and torch.equal(ours.v, theirs.v)


def test_noise_is_the_engines_bit_for_bit():
    keys, steps = np.array([sample_key(3, i) for i in range(200)], np.uint64), np.arange(200) * 7
    want = uniform(keys, steps).tolist()
    assert [noise(int(key), int(step)) for key, step in zip(keys, steps)] == want == lesson_engine.plain_uniform(keys, steps).tolist()


def test_simple_walk_draws_what_the_library_draws_where_something_is_cut_off():
    make = torch.Generator().manual_seed(5)
    logits, u = 3 * torch.randn(300, 40, generator=make), torch.rand(300, generator=make, dtype=torch.float64)
    for dial in (.8, 10, 1, 0), (1.2, 40, .9, 0), (1, 20, .8, .05):
        dials = set_dials(*[dial] * 300)
        assert (simple_walk(logits, dials, u) == engine.walk(logits, dials.numpy(), u.numpy())).float().mean() > .99   # a goal on a border may round


# --- the checks ------------------------------------------------------------------------------------------------------

def softmax_odds(scores, best, dials):
    w = ((scores - best) / dials[:, :1]).softmax(-1)
    w = w * (torch.arange(w.size(1)) < dials[:, 1:2])
    w = w / w.sum(-1, keepdim=True)
    w = w * (w.cumsum(-1) - w < dials[:, 2:3])
    w = w * (w >= dials[:, 3:] * w[:, :1])
    return w / w.sum(-1, keepdim=True)


def keeps_one_row_only(self, layer, k, v):
    start, T = int(self.lengths[0]), k.size(2)
    self.k[layer, :, :, start:start + T], self.v[layer, :, :, start:start + T] = k, v
    return self.k[layer, :, :, :start + T], self.v[layer, :, :, :start + T]


WRONG = {   # mistakes as a learner writes them
    'returns the keys': ('attention.KVCache.update', 'one result', lambda self, layer, k, v: simple_update(self, layer, k, v)[0]),
    'returns what is new': ('attention.KVCache.update', 'new only', lambda self, layer, k, v: (k, v)),
    'asks the first row only': ('attention.KVCache.update', '', keeps_one_row_only),
    'makes probabilities': ('engine.odds', 'sum is one', softmax_odds),
    'divides odds by temperature': ('engine.odds', 'temperature too late', lambda scores, best, dials: odds(scores, best, torch.cat([torch.ones(len(dials), 1), dials[:, 1:]], 1)) / dials[:, :1]),
    'returns a column': ('engine.walk', 'columns', lambda logits, dials, noise: simple_walk(logits, dials, noise)[:, None]),
    'takes the best': ('engine.walk', 'line too short', lambda logits, dials, noise: logits.argmax(-1)),
    'divides everything': ('engine.penalise', 'always divides', lambda logits, seen, penalty: torch.where(seen, logits / penalty[:, None], logits)),
    'adds key and step': ('lesson_engine.noise', 'small steps', lambda key, step: (scatter(key + step) >> 11) * 2.0**-53),
    'knows no step': ('lesson_engine.noise', 'no step', lambda key, step: (scatter(key) >> 11) / 2**53),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


def loop_odds(scores, best, dials):
    rows = []
    for row, (heat, limit, share, least) in zip((scores - best).tolist(), dials.tolist()):
        w = [2.718281828459045**(score / heat) if i < limit else 0.0 for i, score in enumerate(row)]
        total, before = sum(w), 0.0
        for i in range(len(w)):
            w[i], before = w[i] if before < share * total else 0.0, before + w[i]
        rows.append([x if x >= least else 0.0 for x in w])
    return torch.tensor(rows)


RIGHT = {   # other ways to write it, which a check must not refuse
    'a loop over the rows': ('attention.KVCache.update', simple_update),
    'plain Python': ('engine.odds', loop_odds),
    'always sorts': ('engine.walk', simple_walk),
    'searches the border': ('engine.walk', lambda logits, dials, noise: (lambda s, i: (lambda r: i.gather(1, torch.searchsorted(r, noise[:, None] * r[:, -1:]))[:, 0])(odds(s, s[:, :1], dials).cumsum(-1).double()))(*logits.sort(descending=True))),
    'the larger harm': ('engine.penalise', lambda logits, seen, penalty: torch.where(seen, torch.minimum(logits / penalty[:, None], logits * penalty[:, None]), logits)),
    'all 64 bits': ('lesson_engine.noise', lambda key, step: scatter(key + GOLDEN * step) / 2**64),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    assert lesson.check(function, name, strict=True).passed


@pytest.mark.parametrize('name', EXERCISES)
def test_inputs_of_a_check_are_the_same_for_the_same_seed(name):
    one, two = (list(lesson.exercises[name].cases(random.Random(4))) for _ in range(2))
    shown = lambda cases: [lesson.show_call(name, arguments) for arguments in cases]
    assert shown(one) == shown(two)


# --- in the engine ---------------------------------------------------------------------------------------------------

def test_learners_functions_reach_the_engine_and_leave_it_again(tok, model, monkeypatch, spy):
    simple = {'attention.KVCache.update': simple_update, 'engine.walk': simple_walk}
    monkeypatch.setattr(lesson, '_passed', {name: spy.watched(name, simple.get(name)) for name in EXERCISES})
    prompts = [[tok.bos, *tok.encode(text)] for text in ('the cat', 'a', 'the mat sat on')]   # rows of different lengths
    def write(): return [[s.ids for s in group] for group in Engine(model, tok).generate(prompts, 2, 8, temperature=.8, top_k=20, repetition_penalty=1.2)]
    plain = write()
    assert not spy.used
    with lesson_engine.yours(): assert write() == plain
    assert spy.used == set(EXERCISES)
    spy.used.clear()
    assert write() == plain and not spy.used


# --- widgets ---------------------------------------------------------------------------------------------------------

def test_cache_fill_counts_what_is_computed_and_its_slider_shows_a_page():
    fill = CacheFill(list('abcde'), 3, [3., 4., 5.], [3., 1., 1.])
    slider, view = fill.live().children
    for step, (alone, helped) in enumerate([(3, 3), (4, 1), (5, 1)]):
        slider.value = step
        assert view.value == fill.page(step) and view.value in fill.static()
        assert [int(n) for n in re.findall(r'computes (\d+) of', view.value)] == [alone, helped]
        assert view.value.count('background:#ffb74d') == alone + helped   # as many orange boxes
        assert view.value.count('<rect') == 2 * (step + 1)
    assert '5 tokens: 12.0 ms without a cache, 5.0 ms with it' == repr(fill)


def test_sampling_dials_show_the_engines_chances_and_its_sliders_a_page():
    scores = torch.randn(30, generator=torch.Generator().manual_seed(2))
    dials = SamplingDials(scores, lambda i: bytes([97 + i]), lambda *setting: [f'text {setting}'], ((1.0, 0, 1.0, 0.0), (.5, 4, 1.0, 0.0)))
    assert torch.allclose(dials.chances(1.0, 0, 1.0, 0.0), scores.softmax(-1).sort(descending=True).values)
    assert (dials.chances(1.0, 4, 1.0, 0.0) > 0).sum() == 4 and dials.chances(0, 0, 1.0, 0.0).tolist() == [1.0] + [0.0] * 29
    first, second, view = dials.live().children
    assert view.value == dials.page(1.0, 0, 1.0, 0.0) and view.value in dials.static()
    first.children[0].value, first.children[1].value = .5, 4
    assert view.value == dials.page(.5, 4, 1.0, 0.0) and view.value in dials.static()
    second.children[0].value, second.children[1].value = .5, .2
    assert 'top-p 0.5, min-p 0.2' in view.value and 'text (0.5, 4, 0.5, 0.2)' in view.value


def test_widgets_show_any_token_as_text():
    pages = CacheFill(['<i>', '&'], 1, [1.], [1.]).static() + SamplingDials(torch.zeros(1), lambda i: b'<i>', lambda *setting: ['<i>'], ((1.0, 0, 1.0, 0.0),)).static()
    assert '<i>' not in pages and pages.count('&lt;i&gt;') == 4   # twice as boxes, as a bar, and in a text
