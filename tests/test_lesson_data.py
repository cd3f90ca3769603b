"Lesson 2: its checks name a beginner's mistakes, a learner's functions reach the loader, its packing is the loader's, and its widget shows what was measured."
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch

from nanochat import dataloader, lesson, lesson_data
from nanochat.dataloader import DocumentLoader, best_fit
from nanochat.kindergarten import write_parquet
from nanochat.lesson_data import RULES, HalfRead, PackingExplorer, fitted, flat, one_stream, padded, waste
from nanochat.tokenizer import Tokenizer

EXERCISES = ['lesson_data.one_stream', 'dataloader.cut_rows', 'dataloader.best_fit', 'dataloader.deal', 'dataloader.RowStream.place']
TEXTS = ['the cat sat on the mat', 'a dog', '', 'the dog ate the hat of the cat', 'no', 'on and on and on the cat went'] * 8
pytestmark = pytest.mark.usefixtures('own_home')


@pytest.fixture(scope='module')
def tok(): return Tokenizer.train(TEXTS, 280)


@pytest.fixture
def loader(tok, tmp_path):
    "Makes loaders of one shard"
    write_parquet(tmp_path / 'a.parquet', [dict(text=text) for text in TEXTS], row_group_size=7)
    return lambda **options: DocumentLoader([tmp_path / 'a.parquet'], tok, 2, 12, encode_batch=3, **options)


# --- the checks ------------------------------------------------------------------------------------------------------

def joined_behind(documents, bos): return [i for ids in documents if ids for i in ids + [bos]]


def rows_then_shift(ids, sequence_len):
    rows = ids[:-1].view(-1, sequence_len)
    return rows[:, :-1], rows[:, 1:]


def rolled(ids, sequence_len):
    rows = ids[:-1].view(-1, sequence_len)
    return rows, torch.roll(rows, -1, dims=1)


def strictly_shorter(sizes, left):
    best = 0
    for place, size in enumerate(sizes):
        if size < left: best = place
    return best


def count_back(sizes, left):
    place = len(sizes) - 1
    while place >= 0 and sizes[place] > left: place -= 1
    return place


WRONG = {   # mistakes as a learner writes them
    'marks the ends': ('lesson_data.one_stream', 'border behind', joined_behind),
    'sums the lists': ('lesson_data.one_stream', 'no border', lambda documents, bos: sum(documents, [])),
    'nests': ('lesson_data.one_stream', 'not flat', lambda documents, bos: [[bos, *ids] for ids in documents if ids]),
    'keeps the empty ones': ('lesson_data.one_stream', 'empty ones', lambda documents, bos: [i for ids in documents for i in (bos, *ids)]),
    'shifts inside the rows': ('dataloader.cut_rows', 'a place short', rows_then_shift),
    'rolls the rows': ('dataloader.cut_rows', 'round the corner', rolled),
    'targets are inputs': ('dataloader.cut_rows', 'unshifted', lambda ids, T: (ids[:-1].view(-1, T), ids[:-1].view(-1, T))),
    'gives lists': ('dataloader.cut_rows', 'lists', lambda ids, T: (ids[:-1].view(-1, T).tolist(), ids[1:].view(-1, T).tolist())),
    'wants it shorter': ('dataloader.best_fit', 'exactly', strictly_shorter),
    'counts back to minus one': ('dataloader.best_fit', 'minus one', count_back),
    'gives up': ('dataloader.best_fit', 'nothing', lambda sizes, left: best_fit(sizes, left) if sizes[0] <= left else None),
    'gives the length': ('dataloader.best_fit', 'its length', lambda sizes, left: sizes[best_fit(sizes, left)]),
    'starts at zero': ('dataloader.deal', 'same rows', lambda rows, rank, world_size: rows[0::world_size]),
    'chunks': ('dataloader.deal', 'blocks', lambda rows, rank, world_size: rows.chunk(world_size)[rank]),
    'picks one': ('dataloader.deal', 'one row', lambda rows, rank, world_size: rows[rank]),
    'forgets the offset': ('dataloader.RowStream.place', 'whole pieces', lambda self: (self.pieces[0][0], 0) if self.pieces else None),
    'only where': ('dataloader.RowStream.place', 'no number', lambda self: self.pieces[0][0] if self.pieces else None),
    'where reading is': ('dataloader.RowStream.place', 'read ahead', lambda self: (self.pieces[-1][0], self.offset) if self.pieces else None),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


RIGHT = {   # other ways to write it, which a check must not refuse
    'one comprehension': ('lesson_data.one_stream', lambda documents, bos: [i for ids in documents if ids for i in (bos, *ids)]),
    'windows': ('dataloader.cut_rows', lambda ids, T: (lambda w: (w[:, :-1], w[:, 1:]))(ids.unfold(0, T + 1, T))),
    'a loop over rows': ('dataloader.cut_rows', lambda ids, T: tuple(torch.stack([ids[i + shift:i + shift + T] for i in range(0, len(ids) - 1, T)]) for shift in (0, 1))),
    'counts': ('dataloader.best_fit', lambda sizes, left: max(sum(size <= left for size in sizes) - 1, 0)),
    'modulo': ('dataloader.deal', lambda rows, rank, world_size: rows[[i for i in range(len(rows)) if i % world_size == rank]]),
    'asks for the length': ('dataloader.RowStream.place', lambda self: (self.pieces[0][0], self.offset) if len(self.pieces) > 0 else None),
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


# --- in the loader ---------------------------------------------------------------------------------------------------

@pytest.fixture
def pools(monkeypatch):
    "The threads of all loaders made in a test"
    made = []
    class Pool(ThreadPoolExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)
    monkeypatch.setattr(dataloader, 'ThreadPoolExecutor', Pool)
    return made


def test_learners_functions_reach_the_loader_and_leave_it_again(loader, monkeypatch, spy, pools):
    monkeypatch.setattr(lesson, '_passed', {name: spy.watched(name) for name in EXERCISES})
    def read():
        batches, made = [], [loader(), loader(rank=1, world_size=2), loader(packing='best_fit', buffer=5)]
        for one in made:
            batches += [next(one).inputs.tolist() for _ in range(4)]
            one.state_dict()
        for pool in pools: pool.shutdown(cancel_futures=True)  # else a loader reads ahead with the functions it began with
        return batches
    plain = read()
    assert not spy.used
    with lesson_data.yours(): assert read() == plain
    assert spy.used == set(EXERCISES)
    spy.used.clear()
    assert read() == plain and not spy.used


def test_stream_by_hand_is_what_the_loader_lays_out(loader, tok):
    stream = one_stream(tok.encode(TEXTS), tok.bos)
    rows = torch.cat([next(one).inputs for one in [loader()] for _ in range(10)])
    assert rows.flatten().tolist() == stream[:rows.numel()]


@pytest.mark.parametrize('mutant,where', [('whole pieces', 14), ('one more', 25)])   # where in the stream it goes on; right is 24
def test_wrong_place_makes_a_resumed_run_repeat_or_skip(loader, tok, mutant, where):
    "What the zoo shows of them is really there"
    stream, name = one_stream(tok.encode(TEXTS), tok.bos), 'dataloader.RowStream.place'
    found = next(m for m in lesson.exercises[name].mutants if m.name == mutant)
    with lesson.swap(name, lesson.mutated(name, found)):
        before = loader()
        next(before)
        after = loader()
        after.load_state_dict(before.state_dict())
        row = next(after).inputs[0].tolist()
    assert stream[24:36] != row and stream[where:where + 12] == row


# --- packing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('length', [1, 3, 8, 40])
def test_packed_rows_are_full_and_hold_every_token_at_most_once(length):
    sizes = [random.Random(length).randint(1, 20) for _ in range(200)]
    for rule, pack in RULES.items():
        rows, seen = list(pack(sizes, length)), set()
        for row in rows:
            held = sum(end - begin for _, begin, end in row)
            assert held == length if rule != 'one document a row' else 0 < held <= length
            for document, begin, end in row:
                assert 0 <= begin < end <= sizes[document]
                places = {(document, place) for place in range(begin, end)}
                assert not places & seen
                seen |= places
        if rule == 'flat': assert sum(sizes) - len(seen) < length   # all but what does not fill a row
        else: assert {document for document, place in seen if place == 0} == {document for document, _ in seen}   # each from its beginning


def test_best_fit_by_lengths_packs_as_the_loader_packs_tokens(loader, tok):
    sizes = [len(tok.encode(text)) + 1 for text in TEXTS if text]
    packer = loader(packing='best_fit', buffer=6).stream
    for parts in islice(fitted(sizes, 13, buffer=6), 8):
        row = packer.next_row()
        assert np.flatnonzero(row == tok.bos).tolist() == np.cumsum([0, *(end - begin for _, begin, end in parts)])[:-1].tolist()


def test_waste_by_hand():
    assert list(padded([5, 2], 4)) == [[(0, 0, 4)], [(1, 0, 2)]] and list(flat([5, 2, 9], 4)) == [[(0, 0, 4)], [(0, 4, 5), (1, 0, 2), (2, 0, 1)], [(2, 1, 5)], [(2, 5, 9)]]
    assert waste([5, 2], 4, 'one document a row') == {'padding': .25, 'thrown away': pytest.approx(1 / 7), 'rows without a beginning': 0}
    assert waste([5, 2, 9], 4, 'flat') == {'padding': 0, 'thrown away': 0, 'rows without a beginning': .75}
    assert waste([7, 2], 8, 'best fit') == {'padding': 0, 'thrown away': pytest.approx(1 / 9), 'rows without a beginning': 0}


def test_half_read_stream_says_what_waits():
    assert repr(HalfRead([4, 3], 5)) == '<stream: document 1 of 3 tokens; 1 used of the first>' and HalfRead([4, 3], 5).place() == ('document 1', 1)
    assert HalfRead([3], 3).place() is None


# --- the widget ------------------------------------------------------------------------------------------------------

def small_explorer(): return PackingExplorer([['¶', *'abcdefgh'[:n]] for n in (4, 1, 7, 3, 2, 6, 5, 1, 3)] * 4, lengths=(4, 8), rows=4)


def test_explorer_shows_its_rows_and_its_controls_show_a_page():
    explorer = small_explorer()
    controls, view = explorer.live().children
    rule, length = controls.children
    for rule.value in RULES:
        for length.value in (4, 8):
            assert view.value == explorer.page(rule.value, length.value) and view.value in explorer.static()
            parts = [part for row in islice(RULES[rule.value](explorer.sizes, length.value), 4) for part in row]
            assert view.value.count('<title>') == len(parts) and view.value.count('fill="#37474f"') == sum(begin == 0 for _, begin, _ in parts)
    length.value = 5
    assert '5 tokens a row' in view.value


def test_explorer_says_what_was_thrown_away_only_where_it_was():
    explorer = PackingExplorer([['¶', 'a', 'b', 'c', 'd', 'e']] * 20, lengths=(4,), rows=2)
    assert explorer.page('one document a row', 4).count('✂ 2') == 2 and '✂' not in explorer.page('flat', 4)


def test_explorer_takes_any_text_and_too_little_of_it():
    page = PackingExplorer([['¶', '<i>', '&']] * 9, lengths=(3,), rows=2).static()
    assert '<i>' not in page and '&lt;i&gt;' in page
    few = PackingExplorer([['¶', 'a']], lengths=(4, 64))
    assert 'too little text' in few.static() and few.live()
