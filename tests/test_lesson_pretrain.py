"What lesson 6 promises: its checks know the usual mistakes of a training loop, its runs are the library's, and its board shows what a run has written."
import json
import math
import random
import re
import time

import pytest
import torch

from nanochat import core, lesson, lesson_pretrain, train
from nanochat.common import Run, compute_init
from nanochat.lesson_pretrain import Bigram, LossBoard, TokenLoader, lanes_of, little_trainer, reading_steps, recorded, training_loop, value_at
from nanochat.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures('own_home')


# --- exercises -------------------------------------------------------------------------------------------------------

def loop(clear=True, scale=lambda rows, pieces: 1, out=lambda loss: loss.item()):
    "A training loop as a learner might write it, with something changed"
    def training_loop(model, optimizer, steps):
        losses = []
        for pieces in steps:
            total = 0
            for rows in pieces:
                part = model(rows[:, :-1], rows[:, 1:], reduction='mean') * scale(rows, pieces)
                part.backward()
                total = total + part
            optimizer.step()
            if clear: optimizer.zero_grad()
            losses.append(out(total))
        return losses
    return training_loop


def share(rows, pieces): return len(rows) / sum(map(len, pieces))


def every_byte(model, batches, token_bytes, compute):
    nats = sum(model(b.inputs, b.targets, reduction='sum').item() for b in batches)
    return nats / math.log(2) / sum(token_bytes[b.targets].sum().item() for b in batches)


WRONG = {  # a learner's mistake, in a way that is no change of the library's own source -> exercise, the mistake's name, the function
    'takes the mean of the batches': ('core.bits_per_byte', 'mean of batches', lambda m, batches, *rest: sum(core.bits_per_byte(m, [b], *rest) for b in batches) / len(batches)),
    'measures nats': ('core.bits_per_byte', 'nats', lambda *a: core.bits_per_byte(*a) * math.log(2)),
    'looks up minus one': ('core.bits_per_byte', 'counts the empty places', every_byte),
    'forgets to clear': ('lesson_pretrain.training_loop', 'never cleared', loop(clear=False, scale=share)),
    'averages the pieces': ('lesson_pretrain.training_loop', 'mean of means', loop(scale=lambda rows, pieces: 1 / len(pieces))),
    'adds the means': ('lesson_pretrain.training_loop', 'adds up the means', loop()),
    'adds up everything': ('lesson_pretrain.training_loop', 'not divided', loop(scale=lambda rows, pieces: rows[:, 1:].numel())),
    'keeps tensors': ('lesson_pretrain.training_loop', 'tensors', loop(scale=share, out=lambda loss: loss.detach())),
    'returns the last': ('lesson_pretrain.training_loop', 'one number', lambda *a: training_loop(*a)[-1]),
    'counts everything': ('train.count_supervised', 'all places', lambda batches, compute: int(compute.all_reduce(torch.tensor(sum(b.targets.numel() for b in batches))))),
    'returns a tensor': ('train.count_supervised', 'tensor', lambda batches, compute: torch.tensor(train.count_supervised(batches, compute))),
    'forgets the others': ('train.count_supervised', 'own tokens only', lambda batches, compute: max(1, sum(int((b.targets > -1).sum()) for b in batches))),
    'takes 0 for nothing': ('train.smoothed', 'zero is nothing', lambda before, value: .9 * before + .1 * value if before else value),
    'takes the mean of two': ('train.smoothed', 'half and half', lambda before, value: value if before is None else .5 * before + .5 * value),
    'counts 6 N D': ('lesson_pretrain.bill', 'six for each weight', lambda n, f, r, peak, used, gpus: (n * r, 6. * n * n * r, 6 * n * n * r / peak / used / gpus / 3600)),
    'believes the maker': ('lesson_pretrain.bill', 'at the peak', lambda n, f, r, peak, used, gpus: (n * r, n * r * f, n * r * f / peak / gpus / 3600)),
}


@pytest.mark.parametrize('kind', WRONG)
def test_usual_mistakes_are_named(kind, refused):
    name, mistake, function = WRONG[kind]
    refused(function, name, mistake)


def masked(model, batches, token_bytes, compute):
    total = torch.zeros(2, dtype=torch.float64)
    for b in batches:
        wanted = b.targets >= 0
        size, nats = token_bytes[b.targets[wanted]], model(b.inputs, b.targets, reduction='none')[wanted]
        total += torch.stack([nats[size > 0].sum(), size.sum()])
    return (total[0] / total[1] / math.log(2)).item()


def clears_first(model, optimizer, steps):
    losses = []
    for pieces in steps:
        optimizer.zero_grad()
        loss = sum(model(r[:, :-1], r[:, 1:], reduction='sum') for r in pieces) / sum(r[:, 1:].numel() for r in pieces)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


RIGHT = {  # other ways to write it, which a check must not refuse
    'a mask': ('core.bits_per_byte', masked),
    'weights the means': ('lesson_pretrain.training_loop', loop(scale=share)),
    'clears before, and goes backward once': ('lesson_pretrain.training_loop', clears_first),
    'one tensor': ('train.count_supervised', lambda batches, compute: max(int(compute.all_reduce((torch.cat([b.targets.flatten() for b in batches]) != -1).sum())), 1)),
    'a nudge': ('train.smoothed', lambda before, value: value if before is None else before + .1 * (value - before)),
    'hours first': ('lesson_pretrain.bill', lambda n, f, r, peak, used, gpus: (r * n, f * r * n, f * r * n / (3600 * gpus * used * peak))),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_other_right_ways_pass(kind):
    name, function = RIGHT[kind]
    for seed in range(3): assert lesson.check(function, name, seed=seed, strict=True).passed


def test_simple_bits_per_byte_is_the_librarys():
    for seed in range(5):
        for case in lesson_pretrain.bits_per_byte_cases(random.Random(seed)): assert lesson_pretrain.simple_bits_per_byte(*case) == pytest.approx(core.bits_per_byte(*case), rel=1e-5)


def test_running_mean_of_the_loop_is_what_it_was_before_it_had_a_name():
    smooth, losses = None, [6.9, 5.0, 0.0, 3.3, 2.2]
    for loss in losses:
        keep = .9 if smooth is not None else 0.0
        want = keep * (smooth or 0.0) + (1 - keep) * loss
        smooth = train.smoothed(smooth, loss)
        assert smooth == want


# --- the little runs -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def world():
    "A tokenizer, its text in tokens, and where to compute"
    tok = Tokenizer.train(['the cat sat on the mat. the dog sat on the log.'], 270)
    return tok, tok.encode('the cat sat on the mat. the dog sat on the log. ' * 40), compute_init('cpu', 'float32')


def little(world, name='toy', num_steps=6, **more):
    tok, ids, compute = world
    return little_trainer(name, tok, ids, ids[:120], compute, num_steps, rows=4, length=16, n_embd=32, n_layer=1, **more)


def test_loader_reads_every_token_once_and_goes_on_where_it_stood():
    loader = TokenLoader(list(range(26)), 2, 4)
    batches = [loader.next_batch() for _ in range(3)]
    assert torch.cat([b.inputs.flatten() for b in batches]).tolist() == list(range(24))
    assert all(torch.equal(b.targets, b.inputs + 1) for b in batches)
    state, after = loader.state_dict(), loader.next_batch()
    again = TokenLoader(list(range(26)), 2, 4)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert torch.equal(again.next_batch().inputs, after.inputs) and after.inputs[0, 0] == 0   # a new epoch
    short = TokenLoader(list(range(24)), 2, 4)   # the last token has no target any more
    assert [short.next_batch().inputs[0, 0].item() for _ in range(3)] == [0, 8, 0]
    with pytest.raises(lesson.NanochatError, match='longer text'): TokenLoader([1, 2, 3], 2, 4)


def test_steps_are_read_in_order_and_cut_into_the_pieces_asked_for():
    steps = reading_steps(list(range(61)), 4, (2, 1), 4)
    assert [[len(rows) for rows in pieces] for pieces in steps] == [[2, 1]] * 4
    assert [pieces[0][0, 0].item() for pieces in steps] == [0, 15, 30, 45]
    assert reading_steps(list(range(61)), 5, (2, 1), 4)[4][0][0, 0] == 0


def test_run_measures_everything_that_the_board_has_a_lane_for(world):
    trainer = little(world, num_steps=12, eval_every=6)
    result = trainer.fit()
    lanes = lanes_of(trainer.run.metrics('base'))
    assert list(lanes) == list(lesson_pretrain.LANES)
    assert lanes['val_bpb'][-1] == (12, pytest.approx(result['val_bpb'])) and lanes['loss'][-1][1] < lanes['loss'][0][1]


def test_length_of_the_gradient_is_that_of_the_whole_step(world):
    trainer = little(world, grad_accum=2)
    batches = [trainer.loader.next_batch() for _ in range(2)]
    trainer.add_gradients(batches, torch.tensor(train.count_supervised(batches, trainer.compute)))
    want = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm().item()
    assert trainer.loader.metrics['grad_norm'] == pytest.approx(want, rel=1e-5)


def test_run_that_was_cut_ends_on_the_weights_of_one_that_was_not(world):
    class Cut(Exception): pass
    def cut(): raise Cut
    straight = little(world, 'straight', eval_every=99)
    straight.fit()
    with pytest.raises(Cut): little(world, 'cut', eval_every=4, save_every=2, watch=cut).fit()
    again = little(world, 'cut', eval_every=99, again=True)
    again.fit()
    assert again.started == 2   # the cut came before the checkpoint of step 4
    assert all(torch.equal(p, q) for p, q in zip(straight.model.parameters(), again.model.parameters()))


def test_learners_functions_reach_the_run(world, spy):
    def losses(): return [m['loss'] for m in (lambda t: (t.fit(), t.run.metrics('base'))[1])(little(world, num_steps=3, grad_accum=2)) if 'loss' in m]
    with spy.on('core.bits_per_byte', 'train.count_supervised', 'train.smoothed'): ours = losses()
    assert spy.used == {'core.bits_per_byte', 'train.count_supervised', 'train.smoothed'}
    with lesson.swap('train.Trainer.learn', lesson_pretrain.learn_with(training_loop)): assert losses() == pytest.approx(ours, abs=1e-4)
    still = lesson_pretrain.learn_with(lambda model, optimizer, steps: [7.0])
    with lesson.swap('train.Trainer.learn', still): assert losses() == [7.0] * 3


def test_bigrams_learn_what_follows_what():
    model = Bigram(3)
    losses = training_loop(model, lesson_pretrain.Downhill(model, 3.0), reading_steps([0, 1, 2] * 20, 40, (1,), 6))
    assert losses[0] == pytest.approx(math.log(3)) and losses[-1] < .1


# --- the board -------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    "A run whose file of measurements grows"
    run = Run.create('growing')
    for step in range(1, 5): run.log('base', step, loss=6.0 / step, lr=1.0, tok_per_sec=0.0 if step < 3 else 100.0)
    return run


def test_lanes_leave_out_what_was_not_measured(run):
    run.log('base', 5, loss=float('nan'), lr=0.0, val_bpb=1.5, mfu=None)
    lanes = lanes_of(run.metrics('base'))
    assert lanes['loss'][-1] == (4, 1.5) and lanes['lr'][-1] == (5, 0.0) and lanes['val_bpb'] == [(5, 1.5)] and lanes['tok_per_sec'][0][0] == 3
    assert [value_at(lanes['loss'], step) for step in (0, 2, 9)] == [None, 3.0, 1.5]
    assert lanes_of([]) == {}


def test_slider_shows_the_pages_of_the_static_twin(run):
    board = LossBoard(lambda: run.metrics('base'), 'a <run>', pages=4)
    controls, view = board.live().children
    for step in range(1, 5):
        controls.children[1].value = step
        assert view.value == board.page(step)
    assert board.page(4) in board.static() and '<run>' not in board.static()
    assert 'training loss, nats a token: 3<' in board.page(2) and 'a second: not yet' in board.page(2)


def test_what_lies_ahead_is_grey():
    board = LossBoard(lambda: [dict(step=s, loss=float(9 - s)) for s in range(9)])
    points = {step: re.findall(r'<polyline points="([^"]*)" fill="none" stroke="(#\w+)"', board.page(step)) for step in (0, 4, 8)}
    assert [colour for _, colour in points[4]] == ['#9e9e9e80', lesson_pretrain.LANES['loss'][1]]
    assert [len(line.split()) for line, _ in points[4]] == [5, 5] and [len(line.split()) for line, _ in points[8]] == [9]


def test_board_follows_a_run_that_goes_on(run):
    board = LossBoard(lambda: run.metrics('base'))
    play, slider, follow = board.live().children[0].children
    run.log('base', 5, loss=1.0)
    board.reload()
    assert (slider.max, slider.value, play.max) == (5, 5, 5)
    slider.value = 2   # whoever looks back is not dragged to the end
    run.log('base', 6, loss=.9)
    follow.value = True
    for last in (6, 7):
        deadline = time.time() + 20
        while slider.max < last and time.time() < deadline: time.sleep(.02)
        assert (slider.max, slider.value) == (last, 2)
        run.log('base', last + 1, loss=.8)
    follow.value = False


def test_board_of_a_run_without_measurements_says_so():
    assert 'nothing has been measured yet' in LossBoard(list).static() and 'nothing' in repr(LossBoard(list))


def test_tabs_of_the_scales_show_the_recorded_ends():
    scales = recorded('lesson_pretrain')['scales']
    tabs = lesson_pretrain.scale_tabs(scales)
    assert list(tabs.pages) == ['tiny', 'laptop'] == list(scales)
    choice, view = tabs.live().children
    for scale, kept in scales.items():
        choice.value = scale
        assert view.value == tabs.pages[scale] and view.value in tabs.static()
        assert f'<b>{scale}: {kept["run"]}</b>' in view.value
        for points in kept['val_bpb'].values(): assert f'{points[-1][1]:.3f}' in view.value


# --- what was recorded -----------------------------------------------------------------------------------------------

def test_recorded_runs_are_what_the_lesson_says_of_them():
    longer = recorded('kindergarten_base')
    loss = dict(lanes_of(longer['metrics'])['loss'])
    assert max(loss[step] for step in (190, 195)) > math.log(1024) and loss[185] < 2   # the peak
    assert longer['metrics'][-1]['val_bpb'] == pytest.approx(longer['record']['val_bpb'])
    for scale, steps in dict(tiny=150, laptop=300).items():
        ours = recorded('lesson_pretrain')['scales'][scale]
        assert len(ours['val_bpb']) == 3 and all(points[0][1] > 3.5 and points[-1][0] == steps for points in ours['val_bpb'].values())
        assert f'{steps} steps of' in ours['run'] and max(points[-1][1] for points in ours['val_bpb'].values()) - min(points[-1][1] for points in ours['val_bpb'].values()) < 0.1   # the lesson's band
    with pytest.raises(lesson.NanochatError, match='clone'): recorded('none')
