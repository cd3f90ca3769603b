"What lesson 9 promises: its checks know the usual mistakes with a loss mask, its rambler learns to answer and to stop, and its painter grades by the library's own mask."
import re

import pytest
import torch

from nanochat import dataloader, lesson, lesson_sft, sft
from nanochat.common import compute_init
from nanochat.dataloader import Batch, ConversationLoader
from nanochat.lesson_grpo import apple_talk
from nanochat.tokenizer import Tokenizer

EXERCISES = ['lesson_sft.assistant_mask', 'dataloader.rows_to_batch', 'sft.mean_loss', 'dataloader.fill_row', 'dataloader.crop_row']
pytestmark = pytest.mark.usefixtures('own_home')


# --- exercises -------------------------------------------------------------------------------------------------------

def appends_padding(ids, flags, length, pad):
    while len(ids) < length:
        ids.append(pad)
        flags.append(0)
    return ids, flags


def forgets_the_result(words):
    flags, speaking = [], 0
    for word in words:
        flags.append(speaking)
        if word == '<|assistant_start|>': speaking = 1
        if word == '<|assistant_end|>': speaking = 0
    return flags


def with_a_loop(rows):
    inputs = torch.tensor([ids[:-1] for ids, _ in rows])
    targets = torch.tensor([[i if flag else -1 for i, flag in list(zip(ids, flags))[1:]] for ids, flags in rows])
    return Batch(inputs, targets)


def own_mean(model, batches, compute, num_batches):
    nats = count = 0
    for batch in batches[:num_batches]:
        nats += model(batch.inputs, batch.targets, reduction='none').sum().item()
        count += sum(t >= 0 for row in batch.targets.tolist() for t in row)
    return nats / count if count else 0.0


def cut_by_slices(ids, flags, length):
    ids, flags = list(ids)[:length], list(flags)[:length]
    return None if 1 not in flags[1:] else (ids, flags)


def by_spans(words):
    text = ' '.join(words)
    owned = [m.span(1) for m in re.finditer(r'<\|assistant_start\|> (.*?(?:<\|assistant_end\|>|$))', text)]
    silent = [m.span() for m in re.finditer(r'<\|output_start\|>.*?(?:<\|output_end\|>|$)', text)]
    places = [len(' '.join(words[:i])) + (i > 0) for i in range(len(words))]
    return [int(any(a <= p < b for a, b in owned) and not any(a <= p < b for a, b in silent)) for p in places]


WRONG = {  # a learner's mistake, in a way that is no change of the library's own source -> exercise, the mistake's name, the function
    'shifts the flags': ('lesson_sft.assistant_mask', 'one place late', lambda w: ([0] + lesson_sft.assistant_mask(w))[:len(w)]),
    'shifts the flags to the left': ('lesson_sft.assistant_mask', 'one place early', lambda w: lesson_sft.assistant_mask(w)[1:] + [0]),
    'forgets the result of the tool': ('lesson_sft.assistant_mask', 'learns from the tool', forgets_the_result),
    'all but the first': ('lesson_sft.assistant_mask', '', lambda w: [0] + [1] * (len(w) - 1)),
    'shifts only the ids': ('dataloader.rows_to_batch', 'mask of the input', lambda rows: with_a_loop([(ids, [0] + flags[:-1]) for ids, flags in rows])),
    'returns two tables': ('dataloader.rows_to_batch', 'two results', lambda rows: tuple(with_a_loop(rows))[:2]),
    'works in place': ('dataloader.fill_row', 'changes input', appends_padding),
    'learns what it fills': ('dataloader.fill_row', 'learns the padding', lambda ids, flags, length, pad: (ids + [pad] * (length - len(ids)), (flags + [1] * length)[:length])),
    'looks at all flags': ('dataloader.crop_row', 'looks before the cut', lambda ids, flags, length: (ids[:length], flags[:length]) if sum(flags[1:]) else None),
    'averages twice': ('sft.mean_loss', 'mean of means', lambda m, batches, c, n: sum(m(b.inputs, b.targets).item() for b in batches[:n]) / len(batches[:n])),
    'returns a tensor': ('sft.mean_loss', 'a tensor', lambda *a: torch.tensor(sft.mean_loss(*a))),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


RIGHT = {  # other ways to write it, which a check must not refuse
    'spans of text': ('lesson_sft.assistant_mask', by_spans),
    'a loop': ('dataloader.rows_to_batch', with_a_loop),
    'a filled list': ('dataloader.fill_row', lambda ids, flags, length, pad: ((ids + [pad] * length)[:length], (flags + [0] * length)[:length])),
    'slices first': ('dataloader.crop_row', cut_by_slices),
    'plain numbers': ('sft.mean_loss', own_mean),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    for seed in range(3): assert lesson.check(function, name, seed=seed, strict=True).passed


# --- the rambler -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def world():
    "Good talks, a tokenizer, a model that rambles, and where it computes"
    good, rambling = lesson_sft.apple_questions(300)
    compute, tokenizer = compute_init('cpu', 'float32'), Tokenizer.train(lesson_sft.talk_texts(good + rambling), 420)
    return good, tokenizer, lesson_sft.rambler(rambling, tokenizer, compute, steps=60), compute


def test_sentence_of_the_course_is_a_talk_that_nobody_is_shown():
    good, rambling = lesson_sft.apple_questions(400, seed=3)
    questions = [talk[0]['content'] for talk in good]
    assert not any(lesson.SENTENCE in question for question in questions) and len(set(questions)) == 400
    assert [talk[0] for talk in good] == [talk[0] for talk in rambling]


def test_mask_from_the_words_is_the_mask_of_rendering(world):
    good, tokenizer, _, _ = world
    turns = good[0] + good[1] + good[2]
    for talk in [*good[:50], turns]: assert lesson_sft.Marked(tokenizer).render_conversation(talk) == tokenizer.render_conversation(talk)
    ids, flags = tokenizer.render_conversation(good[0])
    assert lesson_sft.Marked(tokenizer, lambda words: [1] * len(words)).render_conversation(good[0]) == (ids, [1] * len(ids))


def test_finetuning_teaches_to_stop_and_leaves_the_rambler_alone(world):
    good, tokenizer, model, compute = world
    weights, exam = [p.clone() for p in model.parameters()], good[-32:]
    def conduct(pupil): return lesson_sft.conduct(lesson_sft.answers(pupil, tokenizer, exam), tokenizer, exam)
    tuned, losses, seen = lesson_sft.finetune(model, tokenizer, good[:-32], compute, steps=40, watch=lambda m: 1, every=10)
    endless = lesson_sft.finetune(model, tokenizer, good[:-32], compute, steps=40, rule=lesson_sft.RULES['no end mark'])[0]
    before, after, rambles = conduct(model), conduct(tuned), conduct(endless)
    assert after['tokens'] < before['tokens'] / 2 and after['stopped'] > .9 > rambles['stopped'] and rambles['tokens'] > after['tokens']
    assert losses[-1] < losses[0] / 2 and len(losses) == 40 and len(seen) == 5
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


def test_learners_functions_reach_finetuning(world, spy):
    good, tokenizer, model, compute = world
    with spy.on(*EXERCISES): lesson_sft.finetune(model, tokenizer, good, compute, steps=1)
    assert spy.used == set(EXERCISES) - {'sft.mean_loss'}   # that one measures


def test_loss_by_token_is_the_loss_that_is_trained(world):
    good, tokenizer, model, compute = world
    nats, everybody, own = lesson_sft.token_losses(model, tokenizer, good[:8])
    batches = ConversationLoader(good[:8], tokenizer, 3, 80, packing='padded', epochs=1)
    with torch.no_grad(): assert nats[own].mean().item() == pytest.approx(sft.mean_loss(model, batches, compute, 9), abs=1e-4)
    assert own.sum() == sum(sum(tokenizer.render_conversation(talk)[1]) for talk in good[:8]) < (everybody.targets >= 0).sum()


def test_answers_are_right_only_word_for_word_and_ended(world):
    good, tokenizer, _, _ = world
    talk = next(talk for talk in good if talk[1]['content'] in ('red.', 'green.'))
    sample = lambda text, finished: lesson_sft.Sample(tokenizer.encode(text), finished=finished)
    for text, finished, right in ((talk[1]['content'], True, 1), (talk[1]['content'], False, 0), ('blue.', True, 0)):
        assert lesson_sft.conduct([sample(text, finished)], tokenizer, [talk])['right'] == right


# --- rows of the loader ----------------------------------------------------------------------------------------------

def test_loader_cuts_and_fills_its_rows_by_these_functions_and_counts_what_it_drops(world):
    good, tokenizer, _, _ = world
    loader = ConversationLoader(good, tokenizer, 4, 24, packing='padded', epochs=1)
    batches = list(loader)
    kept = [row for talk in good if (row := dataloader.crop_row(*tokenizer.render_conversation(talk), 25))]
    assert loader.stats['dropped'] == len(good) - len(kept) > 0 and loader.stats['rows'] == len(kept)
    rows = [(i, t) for batch in batches for i, t in zip(batch.inputs.tolist(), batch.targets.tolist())]
    wanted = dataloader.rows_to_batch([dataloader.fill_row(*row, 25, tokenizer.special['<|assistant_end|>']) for row in kept])
    assert sorted(rows[:len(kept)]) == sorted(zip(wanted.inputs.tolist(), wanted.targets.tolist()))


# --- the painter -----------------------------------------------------------------------------------------------------

@pytest.fixture
def painter(world):
    _, tokenizer, _, _ = world
    ids, flags = tokenizer.render_conversation(apple_talk('Mia', 'red', 12, 5))
    return lesson_sft.MaskPainter(lesson_sft.Marked(tokenizer).words(dataloader.fill_row(ids, flags, len(ids) + 2, tokenizer.special['<|assistant_end|>'])[0])), flags


def test_painter_grades_by_the_librarys_mask(painter):
    painter, flags = painter
    assert painter.rules['the assistant alone'] == flags + [0, 0]
    assert [name for name, rule in painter.rules.items() if not lesson_sft.grade(painter.words, rule)] == ['the assistant alone']
    said = {'everybody': 'user', 'one token late': 'late', 'assistant and tool': 'make results up', 'no end mark': 'not stop', 'padding, too': 'Padding'}
    for name, words in said.items(): assert words in ' '.join(lesson_sft.grade(painter.words, painter.rules[name])), name
    for i in range(len(flags)):   # one token painted wrongly, anywhere, is seen
        wrong = flags + [0, 0]
        wrong[i] = 1 - wrong[i]
        assert lesson_sft.grade(painter.words, wrong) and '✗' in painter.page(*wrong)


def test_painter_menu_and_buttons_show_the_pages_of_the_static_twin(painter):
    painter, flags = painter
    menu, row, view = painter.live().children
    for name, rule in painter.rules.items():
        menu.value = name
        assert [int(button.value) for button in row.children] == rule
        assert view.value == painter.page(*rule) and view.value in painter.static()
    row.children[0].value = True
    assert 'your painting' in view.value
    menu.value = 'paint it yourself'
    assert not any(button.value for button in row.children)


def test_padding_is_told_from_the_end_mark_and_a_result_from_the_answer():
    end = '<|assistant_end|>'
    ask = ['<|bos|>', '<|user_start|>', '<|user_end|>', '<|assistant_start|>']
    assert lesson_sft.token_kinds(ask + ['a', end, end, end])[-4:] == ['answer', 'end mark', 'padding', 'padding']
    assert lesson_sft.token_kinds(ask + ['a', end] + ask[1:] + [end]) == ['prompt'] * 4 + ['answer', 'end mark'] + ['prompt'] * 3 + ['end mark']
    assert lesson_sft.token_kinds(ask + ['<|output_start|>', 'a', '<|output_end|>', 'b', end])[4:] == ['tool'] * 3 + ['answer', 'end mark']
    assert '<i>' not in lesson_sft.MaskPainter(ask + ['<i>', end]).static()
