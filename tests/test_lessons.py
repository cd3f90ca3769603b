"""What a lesson promises: its checks check, its solutions are the library's, its widgets work on paper, and it runs in time."""
import ast
import importlib.util
import inspect
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

import torch

from nanochat import attention, lesson, lesson_attention, lesson_data, lesson_engine, lesson_evaluate, lesson_gpt, lesson_grpo, lesson_midtrain, lesson_muon, lesson_pretrain, lesson_sft, lesson_speedrun, lesson_tokens, lesson_tools, lesson_tour, tokenizer

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / 'lessons').glob('[0-9]*.ipynb'))
for module in (ROOT / 'nanochat').glob('lesson_*.py'): importlib.import_module(f'nanochat.{module.stem}')   # each registers its exercises
EXERCISES = sorted(lesson.exercises)
MUTANTS = [(name, mutant) for name in EXERCISES for mutant in lesson.exercises[name].mutants]
TIME_LIMIT = 90   # seconds of processor time for one lesson at the tiny scale, so that other work on the machine does not fail the test
pytestmark = pytest.mark.usefixtures('own_home')


def cpu_seconds() -> float:
    "Processor time of this process and of its finished children"
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def cells(path: Path, kind: str) -> list[str]:
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def library_name(path: Path, function: str) -> str:
    "The exercise that a lesson's stub belongs to: named in its check, or the only one of that name"
    named = re.search(rf"^check\({function}(?:, '([\w.]+)')?\)", '\n'.join(cells(path, 'code')), re.M)[1]
    return named or lesson.find_exercise(None, next(n for n in EXERCISES if n.endswith(f'.{function}'))).name


def stubs(path: Path) -> dict[str, str]:
    "Name of each exercise's function -> source of its stub in the lesson"
    found = {}
    for source in cells(path, 'code'):
        for match in re.finditer(r'^def (\w+)\(.*\n(?:    .*\n)*?    raise NotImplementedError\(.*\)', source, re.M): found[match[1]] = match[0]
    return found


def solved(source: str, name: str) -> str:
    "A stub that does what the library does, with the stub's own parameters: more than those must never be needed"
    parameters = ', '.join(parameter.arg for parameter in ast.parse(source).body[0].args.args)
    return source.splitlines()[0] + f"\n    return __import__('nanochat.lesson').lesson.library('{name}')({parameters})"


def load(tmp_path: Path, source: str, name: str):
    "The function `name` from a stub's source, imported from a file"
    import importlib.util
    path = tmp_path / f'stub_{name}.py'
    path.write_text(source + '\n')
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


# --- exercises -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', EXERCISES)
def test_library_function_passes_its_own_check(name):
    assert lesson.check(lesson.library(name), name, strict=True).passed


@pytest.mark.parametrize('name', EXERCISES)
def test_solutions_pass_with_other_random_inputs(name):
    for seed in (1, 2, 3): assert lesson.check(lesson.library(name), name, seed=seed).passed


def test_simple_solution_of_training_passes_too():
    assert lesson.check(lesson_tokens.simple_bpe, 'tokenizer.train_bpe', strict=True).passed


@pytest.mark.parametrize('name,mutant', MUTANTS, ids=[f'{name}/{mutant.name}' for name, mutant in MUTANTS])
def test_every_mutant_is_caught_and_named(name, mutant):
    verdict = lesson.check(lesson.mutated(name, mutant), name, strict=False)
    assert not verdict.passed
    assert verdict.mistake == mutant.name and verdict.message == mutant.diagnosis
    with pytest.raises(lesson.CheckFailed): lesson.check(lesson.mutated(name, mutant), name, strict=True)


@pytest.mark.parametrize('name', EXERCISES)
def test_each_exercise_knows_three_mistakes_and_its_mutants_are_small(name):
    exercise = lesson.exercises[name]
    assert len(exercise.mutants) >= 3
    for mutant in exercise.mutants: assert '\n' not in mutant.old + mutant.new and mutant.old != mutant.new
    labels = [m.name for m in exercise.mutants]
    assert len(labels) == len(set(labels))


def test_mutant_that_no_longer_fits_the_source_says_so():
    with pytest.raises(lesson.NanochatError, match='update the mutant'):
        lesson.mutated('tokenizer.merge', lesson.Mutant('gone', 'no such text', 'x', ''))


WRONG = {  # mistakes as a learner writes them, in ways that are no change of the library's own source
    'changes its input': ('tokenizer.merge', 'changes input'),
    'merges only the first': ('tokenizer.merge', 'first only'),
    'forgets to return': ('tokenizer.merge', ''),
    'never ends': ('tokenizer.merge', 'endless'),
    'uses the middle twice': ('tokenizer.merge', 'overlap'),
    'counts to one': ('tokenizer.count_pairs', 'each once'),
    'takes the longest': ('tokenizer.encode_chunk', 'longest first'),
    'returns the pieces': ('tokenizer.encode_chunk', 'pieces'),
    'merges across words': ('tokenizer.train_bpe', 'across chunks'),
    'too few parameters': ('tokenizer.merge', 'signature'),
}


def wrong(kind):
    def changes_its_input(ids, pair, new_id):
        i = 0
        while i + 1 < len(ids):
            if (ids[i], ids[i + 1]) == pair: ids[i:i + 2] = [new_id]
            i += 1
        return ids
    def merges_only_the_first(ids, pair, new_id):
        for i in range(len(ids) - 1):
            if (ids[i], ids[i + 1]) == pair: return ids[:i] + [new_id] + ids[i + 2:]
        return list(ids)
    def forgets_to_return(ids, pair, new_id): tokenizer.merge(ids, pair, new_id)
    def never_ends(ids, pair, new_id):
        i = 0
        while i < len(ids): i += 0
        return ids
    def uses_the_middle_twice(ids, pair, new_id):
        out = []
        for i in range(len(ids)):
            if tuple(ids[i:i + 2]) == pair: out.append(new_id)
            elif i == 0 or tuple(ids[i - 1:i + 1]) != pair: out.append(ids[i])
        return out
    def counts_to_one(ids): return {pair: 1 for pair in zip(ids, ids[1:])}
    def returns_the_pieces(chunk, ranks):
        pieces = {i: piece for piece, i in ranks.items()}
        return [pieces[i] for i in tokenizer.encode_chunk(chunk, ranks)]
    def merges_across_words(texts, num_merges):
        return tokenizer.train_bpe({text.encode(): 1 for text in texts}, num_merges)
    def too_few_parameters(ids, pair): return ids
    return {**locals(), 'takes_the_longest': lesson_tokens.longest_first}[kind.replace(' ', '_')]


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, monkeypatch, refused):
    name, mistake = WRONG[kind]
    monkeypatch.setattr(lesson, 'attempt', lambda f, a, limit=.5, attempt=lesson.attempt: attempt(f, a, min(limit, .5)))
    refused(wrong(kind), name, mistake)


# --- the same for lesson 3: tensors ------------------------------------------------------------------------------------

def interleaved(x, cos, sin):
    a, b, c, s = x[..., ::2], x[..., 1::2], cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([a * c + b * s, b * c - a * s], -1).flatten(-2)


WRONG_TENSORS = {  # a learner's mistake -> exercise, the mistake's name, the function
    'gives numbers for a mask': ('attention.visible', 'not true or false', lambda positions, end: (torch.arange(end) <= positions[:, None, :, None]).float()),
    'turns the mask upside down': ('attention.visible', 'upside down', lambda positions, end: torch.arange(end) > positions[:, None, :, None]),
    'always makes a triangle': ('attention.visible', 'counts from zero', lambda positions, end: torch.ones(positions.size(1), end).tril().bool().expand(len(positions), 1, -1, -1)),
    'returns the weights': ('attention.attend', 'weights', lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1)),
    'cuts the gradient': ('attention.attend', 'gradients', lambda q, k, v: lesson_attention.simple_attend(q.detach(), k, v)),
    'zeroes the weights afterwards': ('attention.attend', 'mask after the softmax', lambda q, k, v: (q @ k.transpose(-2, -1) / q.size(-1)**.5).softmax(-1).tril() @ v),
    'divides by the number of tokens': ('attention.attend', '', lambda q, k, v: lesson_attention.simple_attend(q * (q.size(-1) / q.size(2))**.5, k, v)),
    'returns angles': ('attention.rotary_tables', 'angles', lambda length, head_dim: torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))),
    'computes in float64': ('attention.rotary_tables', 'float64', lambda length, head_dim: tuple(t.double() for t in attention.rotary_tables(length, head_dim))),
    'pairs neighbours': ('attention.apply_rotary', 'neighbours', interleaved),
    'turns the other way': ('attention.apply_rotary', 'turns back', lambda x, cos, sin: attention.apply_rotary(x, cos, -sin)),
    'makes the length one': ('attention.norm', 'length one', lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-12)),
    'forgets the small number': ('attention.norm', 'nothing under zero', lambda x: x / x.square().mean(-1, keepdim=True)**.5),
}


@pytest.mark.parametrize('kind', WRONG_TENSORS)
def test_usual_mistakes_with_tensors_are_named(kind, refused):
    name, mistake, function = WRONG_TENSORS[kind]
    refused(function, name, mistake)


RIGHT_TENSORS = {  # other ways to write it, which a check must not refuse
    'adds minus infinity': ('attention.attend', lambda q, k, v: (q @ k.mT / q.size(-1)**.5 + torch.full((q.size(2),) * 2, -torch.inf).triu(1)).softmax(-1) @ v),
    'einsum': ('attention.attend', lambda q, k, v: torch.einsum('bhts,bhsd->bhtd', (torch.einsum('bhtd,bhsd->bhts', q, k) / q.size(-1)**.5)
                                                               .masked_fill(torch.ones(q.size(2), q.size(2)).tril() == 0, -torch.inf).softmax(-1), v)),
    'four lines': ('attention.attend', lesson_attention.simple_attend),
    'complex numbers': ('attention.apply_rotary', lambda x, cos, sin: (lambda z: torch.cat([z.real, z.imag], -1))(
        torch.complex(*x.chunk(2, -1)) * torch.complex(cos, -sin).unsqueeze(-2))),
    'by hand': ('attention.norm', lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()),
}


@pytest.mark.parametrize('kind', RIGHT_TENSORS)
def test_other_right_ways_with_tensors_pass(kind):
    name, function = RIGHT_TENSORS[kind]
    assert lesson.check(function, name, strict=True).passed


def test_loop_over_every_token_is_told_that_it_is_slow():
    def attend(q, k, v):
        out = torch.zeros_like(q)
        for b in range(q.size(0)):
            for h in range(q.size(1)):
                for t in range(q.size(2)):
                    for s in range(1): out[b, h, t] = (k[b, h, :t + 1] @ q[b, h, t] / q.size(-1)**.5).softmax(0) @ v[b, h, :t + 1]
                    if q.size(2) > 100: time.sleep(.001)
        return out
    assert lesson.check(attend).kind == 'slow'


def test_gradients_are_compared_where_there_are_some():
    "At the smallest input the gradient is zero whatever one does, so a cut one shows only at a larger"
    exercise = lesson.Exercise('attention.norm', lambda rng: iter([(torch.ones(1),), (torch.randn(3, 4),)]), gradients=True)
    assert lesson.examine(exercise, lambda x: attention.norm(x.detach()) + 0 * x).mistake == 'gradients'


def test_gradient_that_is_cut_for_one_input_alone_is_said_to_be_cut():
    assert 'no gradient flows back' in lesson.check(lambda q, k, v: lesson_attention.simple_attend(q.detach(), k, v), 'attention.attend').message


def test_nan_in_the_same_places_is_no_difference_and_elsewhere_is_one():
    nan = torch.tensor([float('nan'), 1.])
    assert lesson.difference(nan, nan.clone()) is None
    assert 'NaN' in lesson.difference(nan, torch.ones(2)) and 'NaN' in lesson.difference(torch.ones(2), nan) and lesson.difference(torch.ones(2), torch.tensor([1., 2.]))
    assert lesson.difference(torch.tensor([float('inf')]), torch.tensor([1.])) is not None


def test_slow_solution_is_told_so():
    def merge(ids, pair, new_id):
        if len(ids) > 10_000: time.sleep(60)   # right, and far too late on the big input, where the check does not wait for it
        return tokenizer.merge(ids, pair, new_id)
    assert lesson.check(merge).kind == 'slow'


def test_check_of_something_unknown_lists_the_exercises():
    with pytest.raises(lesson.NanochatError, match='tokenizer.merge'): lesson.check(lambda: 0)


def test_check_does_not_raise_in_a_notebook_and_does_when_strict(monkeypatch):
    def merge(ids, pair, new_id): return ids
    assert not lesson.check(merge).passed
    monkeypatch.setenv('NANOCHAT_STRICT', '1')
    with pytest.raises(lesson.CheckFailed): lesson.check(merge)


def test_a_function_that_passed_is_used_and_one_that_fails_again_is_not():
    def merge(ids, pair, new_id): return tokenizer.merge(ids, pair, new_id)
    lesson.check(merge)
    assert lesson.chosen('tokenizer.merge') is merge
    lesson.check(lambda ids, pair, new_id: ids, 'tokenizer.merge')
    assert lesson.chosen('tokenizer.merge') is tokenizer.merge


# --- swap ------------------------------------------------------------------------------------------------------------

def test_swap_reaches_the_library_and_undoes_itself_after_an_error():
    original, seen = tokenizer.merge, []
    def mine(ids, pair, new_id):
        seen.append(pair)
        return original(ids, pair, new_id)
    with pytest.raises(KeyError), lesson.swap('tokenizer.merge', mine):
        tokenizer.train_bpe(['low low'], 1)
        assert lesson.library('tokenizer.merge') is original   # a check inside a swap still compares with the library
        raise KeyError
    assert seen and tokenizer.merge is original


def test_swaps_nest():
    original = tokenizer.merge
    first, second = (lambda *a: 1), (lambda *a: 2)
    with lesson.swap('tokenizer.merge', first):
        with lesson.swap('tokenizer.merge', second): assert tokenizer.merge is second and lesson.library('tokenizer.merge') is original
        assert tokenizer.merge is first and lesson.library('tokenizer.merge') is original
    assert tokenizer.merge is original and lesson.library('tokenizer.merge') is original


def test_swap_of_an_unknown_name_is_one_clear_line():
    with pytest.raises(lesson.NanochatError, match='names nothing'): lesson.swap('tokenizer.nothing', print)


# --- widgets and their twins -----------------------------------------------------------------------------------------

def small_zoo(): return lesson.Zoo(lambda: dict(merged=tokenizer.merge([5, 5, 5], (5, 5), 9)), ['tokenizer.merge/overlap', 'tokenizer.merge/drops last'])


def lens():
    words = tokenizer.Tokenizer.train(['the cat sat on the mat'], 270)
    return lesson_gpt.LogitLens(lesson_gpt.toy_model(0, n_layer=2, n_embd=8, vocab_size=words.vocab_size), words, 'the cat')


TWINS = {   # every widget, with something small in it
    lesson.TokenStrip: lambda: lesson.TokenStrip('é!', lesson.single_bytes), lesson.Prediction: lambda: lesson.predict('pi', 'units'), lesson.Answer: lambda: lesson.reveal('pi', 3.14),
    lesson.Tabs: lambda: lesson.Tabs({'<a>': '<p>a</p>', 'b': '<p>b</p>'}, '<one>'), lesson.Zoo: small_zoo, lesson.Story: lambda: lesson.story(1, 'bytes'),
    lesson_tokens.MergeStepper: lambda: lesson_tokens.MergeStepper('low lower lowest low', 4),
    lesson_attention.RopeDial: lambda: lesson_attention.RopeDial(4, steps=3), lesson_attention.AttentionGrid: lambda: lesson_attention.AttentionGrid(['a', ' <b>', '"'], torch.randn(2, 3, 3), 4),
    lesson_gpt.LogitLens: lens,
    lesson_muon.SingularValues: lambda: lesson_muon.SingularValues(torch.randn(12, 8), steps=5), lesson_muon.OptimizerRace: lesson_muon.OptimizerRace,
    lesson_grpo.AdvantageSandbox: lesson_grpo.AdvantageSandbox,
    lesson_midtrain.PackedView: lambda: lesson_midtrain.PackedView(lesson_midtrain.small_tokenizer(), lesson_midtrain.render(lesson_midtrain.small_tokenizer(), lesson_midtrain.talk('<b>', '&')), 2, 4),
    lesson_midtrain.MixtureSliders: lambda: lesson_midtrain.MixtureSliders(dict(chat=4, sums=1), {'as it is': (4, 1), 'half': (1, 1)}),
    lesson_sft.MaskPainter: lambda: lesson_sft.MaskPainter(['<|bos|>', '<|assistant_start|>', '<i>', '<|assistant_end|>', '<|assistant_end|>']),
    lesson_engine.CacheFill: lambda: lesson_engine.CacheFill(['a', '<b>', '&'], 1, [2., 3.], [2., 1.]),
    lesson_engine.SamplingDials: lambda: lesson_engine.SamplingDials(torch.randn(4), lambda i: b'<a&b'[i:i + 1], lambda *setting: ['<i>'], ((1.0, 0, 1.0, 0.0),)),
    lesson_tools.ToolTrace: lambda: lesson_tools.ToolTrace(['<b>', '<|python_start|>', '1/0', '<|python_end|>', '&'], [1, 1, 1, 1]),
    lesson_evaluate.TaskBars: lambda: lesson_evaluate.TaskBars({'<a>': [True, False]}, {'<a>': 25.0}, (1, 2)),
    lesson_evaluate.ChoiceInspector: lambda: lesson_evaluate.ChoiceInspector([dict(query='<b>', choices=['a', 'b c'], gold=0)], [[[b'a'], [b'b', b'<c']]], [[[1.0], [2.0, 0.5]]]),
    lesson_pretrain.LossBoard: lambda: lesson_pretrain.LossBoard(lambda: [dict(step=step, loss=3. - step, lr=1.) for step in range(3)], '<a run>'),
    lesson_tour.AskBox: lambda: lesson_tour.AskBox(lambda question, temperature, top_k: ['yes'], ['Is it?']),
    lesson_data.PackingExplorer: lambda: lesson_data.PackingExplorer([['<b>', 'a', '&']] * 9, lengths=(2, 4), rows=2),
    lesson_speedrun.BudgetDial: lesson_speedrun.BudgetDial,
    lesson_tour.TimeLapse: lambda: lesson_tour.TimeLapse('Mia', [lesson_tour.Snapshot('step 0', 'x', [('a', 1.0)])]),
}


@pytest.mark.parametrize('kind', lesson.Twin.__subclasses__())
def test_widget_has_a_live_and_a_self_contained_static_twin(kind, monkeypatch):
    import ipywidgets
    twin = TWINS[kind]()
    assert isinstance(twin.live(), ipywidgets.DOMWidget)
    page = twin.static()
    assert '<' in page and not re.search(r'<script|https?://|src=|href=', page)
    monkeypatch.setenv('NANOCHAT_WIDGETS', 'static')
    assert set(twin._repr_mimebundle_()) == {'text/plain', 'text/html'}
    monkeypatch.setenv('NANOCHAT_WIDGETS', 'live')
    assert {'application/vnd.jupyter.widget-view+json', 'text/html'} <= set(twin._repr_mimebundle_())


def test_merge_stepper_slider_and_static_frames_show_the_same():
    stepper = lesson_tokens.MergeStepper('the cat sat on the mat', 5)
    text, bar, view = stepper.live().children
    for step in range(len(stepper.frames)):
        bar.children[1].value = step
        assert view.value in stepper.static()
        assert b''.join(stepper.frames[step].pieces).decode() == 'the cat sat on the mat'
    sizes = [len(frame.pieces) for frame in stepper.frames]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    text.value = 'aaaa'   # it has one merge, and the slider stands at more
    assert 'After 1 merge<' in view.value


@pytest.mark.parametrize('text', ['', 'a', ' ', '안녕', '<b>&"', 'aaaa'])
def test_widgets_take_any_text(text):
    assert lesson_tokens.MergeStepper(text, 3).static() and lesson.TokenStrip(text, lesson.single_bytes).static()
    assert '<b>&"' not in lesson_tokens.MergeStepper(text, 3).static()


def test_rope_dial_is_the_librarys_rotation_and_its_slider_shows_a_page():
    turned = attention.apply_rotary(torch.ones(1, 20, 1, 8), *attention.rotary_tables(20, 8))[0, :, 0]
    for query, key in (0, 0), (7, 4), (19, 3): assert abs(turned[query] @ turned[key] / 8 - lesson_attention.rope_score(query - key, 8, 10000.0)) < 1e-5
    dial = lesson_attention.RopeDial()
    query, key, view = dial.live().children
    query.value, key.value = dial.pairs[-1]
    assert view.value == dial.page(*dial.pairs[-1]) and view.value in dial.static()
    scores = [lesson_attention.rope_score(q - k, 8, 10000.0) for q, k in dial.pairs]
    assert len(set(scores[:8])) == 8 and len({round(s, 12) for s in scores[8:]}) == 1   # the query walks away, then both walk on


def test_attention_grid_weights_are_the_librarys_and_its_controls_show_a_page():
    q, k = torch.randn(2, 1, 2, 5, 4)
    scores = q @ k.mT
    window = attention.visible(torch.arange(5)[None], 5, window=4)
    for mask, allowed in dict(causal=attention.visible(torch.arange(5)[None], 5), none=torch.ones(5, 5).bool(), **{'window 4': window}).items():
        want = attention.attend(q, k, torch.eye(5).expand(1, 2, 5, 5), allowed)[0]
        for head in range(2): assert torch.allclose(lesson_attention.grid_weights(scores[0, head], 4, mask), want[head], atol=1e-6)
    grid = lesson_attention.AttentionGrid(list('abcde'), scores[0], 4)
    (head, mask), (scaled, row), view = (c.children if hasattr(c, 'children') else c for c in grid.live().children)
    head.value, mask.value, scaled.value, row.value = 2, 'window 4', False, 3
    assert view.value == grid.page(2, 'window 4', False, 3) and 'd looks at ' in view.value
    assert '<i>' not in lesson_attention.AttentionGrid(['<i>', '&'], scores[0, :, :2, :2], 4).static()


def test_little_model_trains_with_the_function_that_is_swapped_in():
    ids = [1, 2, 3, 4, 5, 6] * 50
    sizes = dict(vocab_size=8, steps=6, length=16, rows=4)
    model, plain = lesson.train_little(ids, **sizes)
    assert lesson.train_little(ids, **sizes)[1] == plain and plain[-1] < plain[0]
    with lesson.swap('attention.attend', lambda q, k, v: torch.zeros_like(q)): assert lesson.train_little(ids, **sizes)[1] != plain
    scores, weights = lesson_attention.watch_attention(model, ids[:9])
    assert scores.shape == weights.shape == (2, 4, 9, 9)
    assert torch.allclose(weights, (scores / 4).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1), atol=1e-5)
    assert attention.attend is lesson.library('attention.attend')


def test_pictures_in_the_zoo_are_compared_by_what_they_show():
    assert lesson.curve_picture([3, 2, 1], 4) == lesson.curve_picture([3, 2.001, 1], 4) != lesson.curve_picture([3, 1, 1], 4)
    assert lesson.curve_picture([3, float('nan')], 4).svg.count('polyline') == 1
    zoo = lesson.Zoo(lambda: dict(map=lesson_attention.map_picture(attention.attend(*torch.eye(4).expand(3, 1, 1, 4, 4))[0, 0])), ['attention.attend/no mask'])
    assert zoo.symptoms[0] != zoo.healthy and zoo.static().count('<svg') == 2 and '<svg' not in repr(zoo)


def test_zoo_shows_symptoms_and_grades_guesses():
    zoo = small_zoo()
    assert zoo.symptoms[0] != zoo.healthy
    assert zoo.guess(1, zoo.letters[0]).passed and not zoo.guess(1, zoo.letters[1]).passed
    menu, view = zoo.live().children[1:3]
    menu.value = zoo.letters[0]
    assert 'passed' in view.value


def test_zoo_survives_a_bug_that_raises():
    zoo = lesson.Zoo(lambda: dict(merged=tokenizer.merge([1], (1, 2), 9)), ['tokenizer.merge/runs over'])
    assert 'IndexError' in str(zoo.symptoms[0])


# --- what is remembered ----------------------------------------------------------------------------------------------

def test_progress_is_one_readable_file_at_home(tmp_path, monkeypatch):
    lesson.check(tokenizer.merge)
    monkeypatch.setattr(lesson, '_revealed', {})
    lesson.predict('pi', 'units', guess=3)
    lesson.reveal('pi', 3.14)
    known = json.loads((tmp_path / 'progress.json').read_text())
    assert known['exercises']['tokenizer.merge'] == dict(attempts=1, passed=True)
    assert known['predictions']['pi'] == dict(guess=3.0, unit='units', actual=3.14)
    assert [p.name for p in tmp_path.iterdir()] == ['progress.json']


def test_no_guess_is_taken_after_the_answer_and_a_run_without_guesses_leaves_no_trace(tmp_path):
    lesson.reveal('e', 2.72)
    assert lesson.predict('e', 'units', guess=2.72).guess is None
    assert not list(tmp_path.iterdir())


def test_calibration_draws_with_and_without_guesses():
    lesson.predict('tau', 'units', guess=6)
    lesson.reveal('tau', 6.28)
    lesson.reveal('no guess', 1.0)
    labels = [label.get_text() for label in lesson.calibration().axes[0].get_yticklabels()]
    assert {'tau', 'no guess'} <= set(labels)


def test_calibration_of_the_whole_course_shows_what_an_earlier_session_kept(tmp_path, monkeypatch):
    assert 'no guess' in lesson.calibration(everything=True).axes[0].get_title()
    kept = dict(low=dict(guess=1.0, unit='m', actual=4.0), high=dict(guess=9.0, unit='m', actual=3.0), near=dict(guess=2.0, unit='m', actual=2.1), unanswered=dict(guess=5.0, unit='m'))
    (tmp_path / 'progress.json').write_text(json.dumps(dict(predictions=kept)))
    monkeypatch.setattr(lesson, '_revealed', {'of this session': 1.0})
    axes = lesson.calibration(everything=True).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['low', 'near', 'high']
    assert axes.get_title() == '3 guesses, 1 of them within a factor of two'


def test_solved_shows_what_passed_today_or_earlier_and_nothing_else(tmp_path):
    assert 'passed' in repr(lesson.solved(1)) and not any(lesson.solved(1).lessons[1].values())
    (tmp_path / 'progress.json').write_text(json.dumps(dict(exercises={'tokenizer.count_pairs': dict(attempts=2, passed=True), 'tokenizer.encode_chunk': dict(attempts=1, passed=False)})))
    lesson.check(tokenizer.merge)
    assert [name for name, passed in lesson.solved(1).lessons[1].items() if passed] == ['tokenizer.count_pairs', 'tokenizer.merge']
    assert '✓ merge' in lesson.solved(1)._repr_html_() and '○ encode_chunk' in repr(lesson.solved(1)) and '2 of 4 passed' in repr(lesson.solved(1))
    assert lesson.solved().total() == f'2 of {len(EXERCISES)} passed'


def test_every_lesson_shows_its_own_exercises_at_its_end():
    for number, path in enumerate(LESSONS):
        assert set(lesson.solved(number).lessons[number]) == {library_name(path, function) for function in stubs(path)}, path.stem
        assert any(source in (f'solved({number})', 'solved()') for source in cells(path, 'code')[-2:]), path.stem


def test_damaged_progress_is_named_and_not_overwritten(tmp_path):
    (tmp_path / 'progress.json').write_text('{"exerc')
    with pytest.raises(lesson.NanochatError, match='progress.json'): lesson.check(tokenizer.merge)
    assert (tmp_path / 'progress.json').read_text() == '{"exerc'


def test_fuel_gauge_sees_quadratic_work():
    gauge = lesson.fuel_gauge('sleep', lambda n: time.sleep((n / 100) ** 2), [10, 20, 40], target=400, budget=5, instead='rest')
    assert 1.6 < gauge.power < 2.3 and not gauge.affordable and 'rest' in repr(gauge)


def test_fuel_gauge_is_not_fooled_by_a_fixed_cost_of_small_sizes():
    gauge = lesson.fuel_gauge('sleep', lambda n: time.sleep(.02 + n / 1000), [2, 4, 8], target=1000)
    assert gauge.power == 1 and gauge.estimate >= 1


# --- the lessons themselves ------------------------------------------------------------------------------------------

def test_there_are_lessons():
    assert LESSONS and EXERCISES


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_folded_solutions_are_the_librarys_source(path):
    assert lesson.stale_solutions(path) == [], 'run nanochat.lesson.sync_solutions on this lesson'
    text = '\n'.join(cells(path, 'markdown'))
    for name in re.findall(r'<!-- solution ([\w.]+) -->', text): assert lesson.solution(name) in text


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_each_exercise_has_header_stub_three_folds_and_check(path):
    text, code = '\n'.join(cells(path, 'markdown')), '\n'.join(cells(path, 'code'))
    headers = re.findall(r'### Exercise [\d.]+ · (\w+)\n\n> \*\*Difficulty\*\* ([●○]{5}) · \*\*Importance\*\* ([●○]{5}) · \*\*about (\d+) minutes\*\*', text)
    assert len(headers) >= 4
    for function, *_ in headers:
        section = text.split(f'· {function}\n')[1].split('### ')[0]
        folds = re.findall(r'<details><summary>(.*?)</summary>', section)
        assert folds[0].startswith('Hint') and folds[1].startswith('Pseudocode') and folds[2].startswith('Solution')
        assert section.count('<details>') == section.count('</details>') == len(folds)
        assert f'<!-- solution {library_name(path, function)} -->' in section
        assert f'\ncheck({function}' in code


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_stubs_fail_with_their_own_message_and_fit_the_librarys_parameters(path, tmp_path):
    found = stubs(path)
    assert len(found) >= 4
    for function, source in found.items():
        stub = load(tmp_path, source, function)
        verdict = lesson.check(stub, library_name(path, function))
        assert verdict.kind == 'stub' and f'{function} is not written yet' in verdict.message
        with pytest.raises(lesson.CheckFailed, match='not written yet'): lesson.check(stub, verdict.name, strict=True)
        needed = [p.name for p in inspect.signature(lesson.library(verdict.name)).parameters.values() if p.default is p.empty]
        assert list(inspect.signature(stub).parameters) == needed


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_bugs_in_a_lessons_zoo_exist_and_are_at_least_three(path):
    specimens = re.findall(r"'([\w.]+)/([\w ]+)'", next(source for source in cells(path, 'code') if 'Zoo(probe' in source).split('Zoo(probe')[1])
    assert len(specimens) >= 3
    for name, label in specimens: assert label in [mutant.name for mutant in lesson.exercises[name].mutants], label


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_every_prediction_of_a_lesson_is_answered(path):
    text = '\n'.join(cells(path, 'code'))
    asked = re.findall(r"^predict\('(.+?)', '(.+?)'\)", text, re.M)
    assert len(asked) >= 3
    for name, unit in asked: assert re.search(rf"^reveal\('{re.escape(name)}', .+, '{re.escape(unit)}'\)", text, re.M), name


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_words_in_a_lessons_glossary_are_used_in_it(path):
    text = '\n'.join(cells(path, 'markdown'))
    lessons_text, _, words = text.partition('## Words of this lesson')
    terms = re.findall(r'\*\*(.+?)\*\*', words.split('\n## ')[0])
    assert len(terms) >= 5, 'the lesson has no glossary'
    for term in terms: assert term.lower() in lessons_text.lower(), term


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_every_lesson_knows_the_same_four_scales(path):
    "In the parameter's comment, in the table of what they cost, and in the cell that makes the sizes"
    scales, code = ['tiny', 'laptop', 'gpu', 'node'], cells(path, 'code')
    assert 'scale = "tiny"     # tiny, laptop, gpu or node' in '\n'.join(code)
    assert re.findall(r'`(tiny|laptop|gpu|node)`', '\n'.join(re.findall(r'^\| `.*', cells(path, 'markdown')[1], re.M))) == scales
    trees = [ast.walk(ast.parse(source)) for source in code if '[scale]' in source]
    tables = [[word.arg for word in node.value.keywords] for tree in trees for node in tree if isinstance(node, ast.Subscript) and getattr(node.slice, 'id', '') == 'scale']
    assert tables == [scales]


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_every_lesson_has_a_band_that_a_number_can_miss(path):
    "At most half of its middle to either side, but for a ratio of two times by the clock"
    calls = [node for source in cells(path, 'code') for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'expect']
    assert calls, 'no number of the lesson is compared with ours'
    for call in calls:
        values = {word.arg: word.value for word in call.keywords}
        if isinstance(call.args[1], ast.Call) or 'times as fast' in values['name'].value: continue   # a middle that is computed; a ratio of speeds
        assert ast.literal_eval(values['tol']) <= abs(ast.literal_eval(call.args[1])) / 2, values['name'].value
    assert 'is within' in path.read_text()


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_every_lesson_draws_what_comes_of_the_learners_functions_over_what_comes_of_the_librarys(path):
    code = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    drawn = [c for c in code if re.search(r"label='(with your functions|yours)'|plot\(.*'yours'\)", ''.join(c['source']))]
    assert any('image/png' in o.get('data', {}) for c in drawn for o in c['outputs'])
    assert re.search(r'swap\(.*chosen|with .*yours\(\)|first_arguments\(chosen|swap\(place, function\)|swap\(name, function\)', '\n'.join(cells(path, 'code')))


def test_picture_of_lesson_1_shows_the_learners_own_tokenizer(monkeypatch):
    import matplotlib.pyplot as plt
    import regex
    from fastcore.test import test_eq
    names = dict(text=lesson.lesson_text(24_000), regex=regex, plt=plt, tokenizer=tokenizer, SPLIT_PATTERN=tokenizer.SPLIT_PATTERN, swap=lesson.swap, chosen=lesson.chosen, test_eq=test_eq)
    exec(next(source for source in cells(LESSONS[1], 'code') if 'def spell' in source).split('\nspell(')[0], names)
    picture = next(source for source in cells(LESSONS[1], 'code') if 'def shrink' in source)
    exec(picture, names)
    (_, ours), (_, yours) = (line.get_data() for line in plt.gca().lines)
    assert len(ours) == 7 and list(ours) == list(yours) and ours[-1] > ours[0] == 1
    for name, mutant in (('tokenizer.merge', 'overlap'), ('tokenizer.encode_chunk', 'newest first'), ('tokenizer.train_bpe', 'rarest')):
        mine = lesson.mutated(name, next(m for m in lesson.exercises[name].mutants if m.name == mutant))
        monkeypatch.setattr(lesson, '_passed', {name: mine})
        with pytest.raises(AssertionError): exec(picture, names)
    plt.close('all')


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_stored_lesson_is_executed_and_shows_no_error_and_no_machine(path):
    document = json.loads(path.read_text())
    code = [c for c in document['cells'] if c['cell_type'] == 'code']
    assert any('parameters' in c['metadata'].get('tags', []) for c in code)
    assert sum(bool(c['outputs']) for c in code) > len(code) / 2
    assert not [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert not re.search(r'/home/|/root/|/work/|/tmp/|Traceback', path.read_text())


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_record_of_the_widgets_is_of_the_lesson_as_it_stands(path):
    spec = importlib.util.spec_from_file_location('lab_widgets', ROOT / 'benchmarks' / 'lab_widgets.py')
    spec.loader.exec_module(lab := importlib.util.module_from_spec(spec))
    rows = json.loads(lab.RECORD.read_text())
    known = {row['widget'] for row in rows} | {kind.__name__ for kind in lesson.Twin.__subclasses__()}
    sources = [''.join(c['source']) if c['cell_type'] == 'code' else '' for c in json.loads(path.read_text())['cells']]
    def widget(i):
        try: return lab.name_of(sources, i)
        except (AttributeError, IndexError, SyntaxError): return None   # the cell shows no call
    shown = [(i, widget(i)) for i in range(len(sources)) if widget(i) in known]
    assert [(row['cell'], row['widget']) for row in rows if row['lesson'] == path.stem] == shown, f'run benchmarks/lab_widgets.py {path.stem}'
    assert all(row['good'] for row in rows)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_lesson_with_solutions_filled_in_passes_every_check_under_papermill_within_its_time(path, tmp_path):
    "What a learner has at the end: every stub does what the library does, and checks raise. (With the stubs, nbdev_test runs it.)"
    document = json.loads(path.read_text())
    for c in document['cells']:
        for function, source in stubs(path).items():
            text = ''.join(c['source'])
            if c['cell_type'] == 'code' and source in text:
                c['source'] = text.replace(source, solved(source, library_name(path, function)))
    filled, out = tmp_path / 'filled.ipynb', tmp_path / 'out.ipynb'
    filled.write_text(json.dumps(document))
    env, before = {**os.environ, 'NANOCHAT_STRICT': '1'}, cpu_seconds()
    done = subprocess.run([sys.executable, '-m', 'papermill', str(filled), str(out), '-p', 'scale', 'tiny', '--cwd', str(tmp_path), '--no-progress-bar'],
                          env=env, capture_output=True, text=True, timeout=10 * TIME_LIMIT)   # of the clock: other work on the machine must not fail the test
    assert done.returncode == 0, done.stderr[-2000:]
    assert cpu_seconds() - before < TIME_LIMIT
    plain = [''.join(o['data']['text/plain']) for c in json.loads(out.read_text())['cells'] for o in c.get('outputs', []) if 'data' in o]
    assert sum('✓ passed' in text for text in plain) >= len(stubs(path))
    kinds = {mime for c in json.loads(out.read_text())['cells'] for o in c.get('outputs', []) for mime in o.get('data', {})}
    assert 'text/html' in kinds and 'application/vnd.jupyter.widget-view+json' not in kinds   # the static twins
