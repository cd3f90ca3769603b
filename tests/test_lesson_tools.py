"What lesson 11 promises: its checks know the usual mistakes, its engine with a script is the engine, and its trace tells what happened."
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from nanochat import engine, lesson, lesson_grpo, lesson_tools, tools
from nanochat.engine import readable_text
from nanochat.gpt import GPT, GPTConfig

LESSON = Path(__file__).parent.parent / 'lessons' / '11_tools.ipynb'
EXERCISES = ['tools.Reader.product', 'tools.Reader.factor', 'tools.show_number', 'tools.calculator', 'engine.last_call', 'lesson_tools.take_turns', 'tasks.extract_code']
pytestmark = pytest.mark.usefixtures('own_home')


# --- exercises -------------------------------------------------------------------------------------------------------

def one_line_each(self):
    value = self.factor()
    if self.take('operator', '*'): return value * self.total()
    if self.take('operator', '/'): return value / self.total()
    return value


def tail_call(self):
    value = self.factor()
    if self.take('operator', '*'): return value * self.product()
    if self.take('operator', '/'): return value / self.product()
    return value


def begins_with_itself(self):
    value = self.product()
    while sign := self.take('operator', '*/'): value = value * self.factor() if sign == '*' else value / self.factor()
    return value


def forgets_the_depth(self):
    self.depth += 1
    if self.depth > 32: raise ValueError('too deep')
    if sign := self.take('operator', '+-'): return self.factor() if sign == '+' else -self.factor()
    if self.take('operator', '('):
        value = self.total()
        self.need('operator', ')')
        return value
    if (text := self.take('string')) is None: return self.need('number')
    self.need('count')
    part = self.need('string')
    self.need('operator', ')')
    return Fraction(text.count(part))


def by_running(expression):
    try: return str(eval(expression))   # of the check's inputs only, none of which would hurt
    except Exception: return None


def shouts(expression):
    found = tools.calculator(expression)
    return 'error' if found is None else found


WRONG = {  # a learner's mistake, in a way that is no change of the library's own source -> exercise, the mistake's name, the function
    'a total behind every operator': ('tools.Reader.product', 'precedence', one_line_each),
    'a product behind every operator': ('tools.Reader.product', 'from the right', tail_call),
    'begins with itself': ('tools.Reader.product', 'calls itself', begins_with_itself),
    'computes with floats': ('tools.Reader.product', 'float', lambda self: float(self.factor())),
    'forgets to climb out': ('tools.Reader.factor', 'depth only grows', forgets_the_depth),
    'shows floats': ('tools.show_number', 'float', lambda value: str(float(value))),
    'shows fractions': ('tools.show_number', 'fraction', lambda value: str(value)),
    'rounds to ten digits with g': ('tools.show_number', 'exponent', lambda value: f'{float(value):.10g}'),
    'returns numbers': ('tools.show_number', 'no text', lambda value: float(value)),
    'runs it': ('tools.calculator', 'eval', by_running),
    'says error': ('tools.calculator', 'text for no answer', shouts),
    'takes the first call': ('engine.last_call', 'no call', lambda ids, start: ids[len(ids) - ids[::-1].index(start):-1]),
    'empties the queues': ('lesson_tools.take_turns', 'changes input', lambda choices, queues: lesson_tools.take_turns(choices, [list(q) for q in queues] + [q.clear() for q in queues][:0])),
    'forgets the queues': ('lesson_tools.take_turns', 'not three', lambda choices, queues: lesson_tools.take_turns(choices, queues)[:2]),
    'finds nothing without a fence': ('tasks.extract_code', 'not found', lambda text: (m := re.search(r'```\w*[ \t]*\n(.*?)```', text, re.DOTALL)) and m[1].strip()),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


def right_factor(self):
    before = self.depth
    try: return forgets_the_depth(self)
    finally: self.depth = before


RIGHT = {  # other ways to write it, which a check must not refuse
    'climbs out at the end': ('tools.Reader.factor', right_factor),
    'a decimal': ('tools.show_number', lambda value: str(value) if value.denominator == 1 else tools.show_number(Fraction(str(value.numerator)) / value.denominator)),
    'a loop': ('engine.last_call', lambda ids, start: next((ids[i + 1:-1] for i in range(len(ids) - 1, -1, -1) if ids[i] == start), [])),
    'one loop': ('lesson_tools.take_turns', lambda choices, queues: ([q[0] if q else c for c, q in zip(choices, queues)], [int(not q) for q in queues], [list(q)[1:] for q in queues])),
    'split': ('tasks.extract_code', lambda text: (text.split('```')[1].partition('\n')[2] if text.count('```') > 1 else text).strip()),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    for seed in range(3): assert lesson.check(function, name, seed=seed, strict=True).passed


def test_a_function_that_calls_itself_by_the_librarys_name_is_tried_inside_of_the_library():
    "Or the library's own would answer for all but the outermost bracket"
    met = []
    def factor(self):
        met.append(self.depth)
        return lesson.library('tools.Reader.factor')(self)
    assert lesson.check(factor, 'tools.Reader.factor').passed and max(met) > 1
    assert tools.Reader.factor is lesson.library('tools.Reader.factor')


# --- the pupils ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def world():
    "A tokenizer for the talks, and a model that knows nothing"
    taught, exam = lesson_tools.sums_apart()
    tokenizer = lesson_grpo.apple_tokenizer(taught + exam)
    torch.manual_seed(0)
    return tokenizer, GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))


def test_no_sum_of_the_exam_is_ever_taught_and_the_courses_sentence_is_in_it():
    taught, exam = lesson_tools.sums_apart()
    def sums(talks): return {talk[1]['content'][0]['text'] for talk in talks}
    assert not sums(taught) & sums(exam) and lesson.SENTENCE in [talk[0]['content'] for talk in exam]
    starts = [{part for text in sums(talks) for part in text.split('-')} for talks in (taught, exam)]
    assert starts[1] <= starts[0]   # every number of the exam is known, if not together with the other


def test_exam_wants_exactly_the_right_answer(world, monkeypatch):
    tokenizer, model = world
    talk = lesson_grpo.apple_talk('Mia', 'red', 20, 3)
    for reply, right in (('17 are left.', True), ('<<20-3>>17 are left.', True), ('<<20-3>>7 are left.', False), ('117 are left.', False), ('<<20-3>>17 are left', False)):
        sample = lesson_tools.play(model, tokenizer, [reply])[0]
        monkeypatch.setattr(lesson_tools.Engine, 'generate', lambda self, prompts, **settings: [[sample]])
        assert lesson_tools.sit_exam(model, tokenizer, [talk])[2] == [right], reply
    assert lesson_tools.by_heart(talk)[1]['content'] == '17 are left.'


def test_unmasked_talk_counts_the_whole_answer_and_nothing_before_it(world):
    tokenizer, _ = world
    talk = lesson_grpo.apple_talk('Mia', 'red', 20, 3)
    with lesson.swap('tokenizer.Tokenizer.render_conversation', lesson_tools.unmasked): ids, mask = tokenizer.render_conversation(talk)
    assert ids == tokenizer.render_conversation(talk)[0]
    asked = ids.index(tokenizer.special['<|assistant_start|>']) + 1
    assert mask == [0] * asked + [1] * (len(ids) - asked) and sum(mask) == sum(tokenizer.render_conversation(talk)[1]) + 3


# --- the engine with a script ------------------------------------------------------------------------------------------

REPLIES = ['<<12-5>> left', 'x <<20-3-4>>, then <<13*2>>.', '<<1/0>>!', 'none', '5>> and <<7']
READ = ['<<12-5=7>> left', 'x <<20-3-4=13>>, then <<13*2=26>>.', '<<1/0>>!', 'none', '5>> and <<7']


@pytest.mark.parametrize('mine', [False, True])
def test_script_is_answered_by_the_real_engine_each_row_with_its_own_results(world, mine):
    tokenizer, model = world
    if mine:
        with lesson_tools.yours(): samples = lesson_tools.play(model, tokenizer, REPLIES)
    else: samples = lesson_tools.play(model, tokenizer, REPLIES)
    assert [readable_text(tokenizer, s.ids) for s in samples] == READ
    assert [[i for i, m in zip(s.ids, s.mask) if m] for s in samples] == [lesson_tools.spell(tokenizer, reply) for reply in REPLIES]
    assert all(s.finished for s in samples) and engine.choose_tokens is lesson.library('engine.choose_tokens')


def test_learners_functions_reach_the_engine_and_leave_it_again(world, monkeypatch, spy):
    tokenizer, model = world
    monkeypatch.setattr(lesson, '_passed', {name: spy.watched(name) for name in EXERCISES})
    with lesson_tools.yours():
        lesson_tools.play(model, tokenizer, REPLIES)
        from nanochat.tasks import extract_code
        extract_code('x')
    assert spy.used == set(EXERCISES) == set(lesson_tools.LEARNED)
    for name in [*EXERCISES, 'engine.Engine._choose']:
        owner, attribute = lesson.locate(name)
        assert getattr(owner, attribute) is lesson.library(name)


def test_marks_and_queues_of_a_learner_are_the_engines(world):
    tokenizer, model = world
    for label, symptom in {'result not masked': lambda s: all(s[0].mask), 'one queue for all': lambda s: '13' not in readable_text(tokenizer, s[1].ids)}.items():
        mutant = next(m for m in lesson.exercises['lesson_tools.take_turns'].mutants if m.name == label)
        with lesson.swap('engine.Engine._choose', lesson_tools.by_turns()), lesson.swap('lesson_tools.take_turns', lesson.mutated('lesson_tools.take_turns', mutant)):
            assert symptom(lesson_tools.play(model, tokenizer, ['<<12-5>> left', '<<6+7>> left now'])), label


# --- pictures and the trace --------------------------------------------------------------------------------------------

def test_reader_is_as_deep_as_its_brackets_and_signs():
    assert lesson_tools.reading_depths('2*(3+4)') == [('2', 1), ('*', 0), ('(', 1), ('3', 2), ('+', 1), ('4', 2), (')', 1)]
    assert [depth for _, depth in lesson_tools.reading_depths('--5')] == [1, 2, 3]
    assert len(lesson_tools.depth_chart('1+2').axes[0].patches) == 3


def test_chart_of_turns_paints_each_token_by_its_writer(world):
    tokenizer, model = world
    samples = lesson_tools.play(model, tokenizer, REPLIES)
    colours = [patch.get_facecolor() for patch in lesson_tools.turns_chart(tokenizer, samples).axes[0].patches]
    assert len(colours) == sum(len(s.ids) for s in samples) and len(set(colours)) == 2
    assert min(colours.count(c) for c in set(colours)) == sum(s.mask.count(0) for s in samples)


def test_trace_tells_who_wrote_each_token_and_what_waits(world):
    tokenizer, model = world
    samples = lesson_tools.play(model, tokenizer, REPLIES)
    traces = [lesson_tools.trace_reply(tokenizer, tokenizer.encode('Say.'), s) for s in samples]
    for trace, sample in zip(traces, samples):
        assert [trace.moment(i)['writer'] == 'the model' for i in range(len(sample.ids))] == [bool(m) for m in sample.mask]
        for i, mask in enumerate(sample.mask[1:]): assert bool(trace.moment(i)['queue']) == (mask == 0)   # what waits now is written next
    second = traces[1]
    first, last = (i for i, piece in enumerate(second.reply) if piece == '<|python_end|>')
    assert [(second.moment(i)['expression'], second.moment(i)['result']) for i in (first - 1, first, last)] == [('20-3-4', 'not asked yet'), ('20-3-4', '13'), ('13*2', '26')]
    assert 'no answer' in traces[2].moment(traces[2].reply.index('<|python_end|>'))['doing'] and traces[2].moment(len(samples[2].ids) - 1)['result'] == 'none'
    assert repr(second) == f'tool-call trace: {len(samples[1].ids)} tokens, {samples[1].mask.count(0)} of them by a tool; calls: 20-3-4 → 13, 13*2 → 26'
    assert 'calls: none' in repr(traces[3])


def test_stray_end_of_a_call_is_no_call_in_the_trace(world):
    tokenizer, model = world
    stray = lesson_tools.trace_reply(tokenizer, [], lesson_tools.play(model, tokenizer, ['5>> and'])[0])
    at = stray.reply.index('<|python_end|>')
    assert stray.moment(at)['expression'] == '' and stray.moment(at)['queue'] == []


def test_trace_slider_shows_the_pages_of_the_static_twin_and_escapes_what_it_shows(world):
    trace = lesson_tools.ToolTrace(['<i>', '<|python_start|>', '1', '<|python_end|>', '<|output_start|>', '1', '<|output_end|>', '&'], [1, 1, 1, 0, 0, 0, 1])
    slider, view = trace.live().children
    for step in range(len(trace.reply)):
        slider.value = step
        assert view.value == trace.page(step) and view.value in trace.static()
    assert '<i>' not in trace.static() and view.value.count('#ffb74d') == 3 == trace.mask.count(0)


# --- the lesson ------------------------------------------------------------------------------------------------------

def test_total_in_the_lessons_text_is_the_librarys():
    import inspect
    text = '\n'.join(''.join(c['source']) for c in json.loads(LESSON.read_text())['cells'] if c['cell_type'] == 'markdown')
    for line in inspect.getsource(tools.Reader.total).splitlines()[1:]: assert line.strip() in text
