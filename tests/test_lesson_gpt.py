"""What lesson 4 promises: its checks name the mistake, its solutions are the library's, and its lens shows the model."""
import pytest
import torch
import torch.nn.functional as F

from nanochat import lesson, lesson_gpt
from nanochat.attention import norm
from nanochat.tokenizer import Tokenizer

EXERCISES = sorted(name for name in lesson.exercises if name.startswith('gpt.'))
pytestmark = pytest.mark.usefixtures('own_home')


# --- exercises -------------------------------------------------------------------------------------------------------

def gelu_mlp(self, x): return self.c_proj(F.gelu(self.c_fc(x)))
def parallel(self, x, cos, sin): return x + self.attn(norm(x), cos, sin) + self.mlp(norm(x))
def exchanged(self, x, cos, sin):
    x = x + self.mlp(norm(x))
    return x + self.attn(norm(x), cos, sin)
def forgetful(self, x, cos, sin):
    x = x + self.attn(norm(x), cos, sin)
    self.mlp(norm(x))
def scores_at_once(self, idx): return self(idx)
def uncut(self, idx):
    x = self.embed(idx)
    for block in self.transformer.h: x = block(x, self.cos, self.sin)
    return norm(x)
def divided(self, x): return torch.tanh(self.lm_head(x).float() / 15)
def mean_nll(self, x, targets): return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten(), ignore_index=-1)
def flat_nll(self, x, targets): return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='none')
def two_bits(self, x, targets): return lesson_gpt.simple_nll(self, x, targets) / 0.6931471805599453
def cut_off(self, x, targets): return lesson_gpt.simple_nll(self, x.detach(), targets)
def formula(self):
    c = self.config
    return 6 * (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.sequence_len
def of_the_text(self): return lesson_gpt.simple_flops(self) * self.config.sequence_len


WRONG = [  # a learner's function -> exercise, the mistake's name
    (gelu_mlp, 'gpt.MLP.forward', 'another bend'), (parallel, 'gpt.Block.forward', 'side by side'), (exchanged, 'gpt.Block.forward', 'MLP first'),
    (forgetful, 'gpt.Block.forward', ''), (scores_at_once, 'gpt.GPT.hidden', 'logits'), (uncut, 'gpt.GPT.hidden', 'whole tables'),
    (divided, 'gpt.GPT.logits', ''), (mean_nll, 'gpt.GPT.token_nll', 'mean'), (flat_nll, 'gpt.GPT.token_nll', 'flat'), (two_bits, 'gpt.GPT.token_nll', 'bits'),
    (cut_off, 'gpt.GPT.token_nll', 'gradients'), (formula, 'gpt.GPT.flops_per_token', 'equal heads'), (of_the_text, 'gpt.GPT.flops_per_token', 'whole text')]


@pytest.mark.parametrize('mine,name,mistake', WRONG, ids=[mine.__name__ for mine, *_ in WRONG])
def test_usual_mistakes_are_named(mine, name, mistake, refused): refused(mine, name, mistake)


def bent(self, x):
    hidden = x @ self.c_fc.weight.T
    return torch.where(hidden > 0, hidden**2, 0.) @ self.c_proj.weight.T
def longhand(self, x, cos, sin):
    fetched = x + self.attn(norm(x), cos, sin)
    return self.mlp(norm(fetched)) + fetched
def picked(self, x, targets):
    p = self.logits(x).softmax(-1)
    return torch.stack([torch.stack([-p[b, t, i].log() if i >= 0 else p.new_zeros(()) for t, i in enumerate(row)]) for b, row in enumerate(targets.tolist())])


RIGHT = [(bent, 'gpt.MLP.forward'), (longhand, 'gpt.Block.forward'), (lesson_gpt.simple_hidden, 'gpt.GPT.hidden'), (lesson_gpt.simple_nll, 'gpt.GPT.token_nll'),
         (picked, 'gpt.GPT.token_nll'), (lesson_gpt.simple_flops, 'gpt.GPT.flops_per_token')]


@pytest.mark.parametrize('mine,name', RIGHT, ids=[mine.__name__ for mine, _ in RIGHT])
def test_other_right_ways_pass(mine, name):
    assert lesson.check(mine, name, strict=True).passed


def test_a_check_leaves_the_learners_random_numbers_alone():
    before = torch.random.get_rng_state()
    for name in EXERCISES: lesson.check(lesson.library(name), name)
    assert torch.equal(before, torch.random.get_rng_state())


# --- the learner's functions in the library ----------------------------------------------------------------------------

def test_little_model_trains_with_functions_that_take_fewer_arguments():
    ids, sizes = [1, 2, 3, 4, 5, 6] * 50, dict(vocab_size=8, steps=6, length=16, rows=4)
    plain = lesson.train_little(ids, **sizes)[1]
    for mine, name in RIGHT[:4]:
        with lesson.swap(name, lesson_gpt.first_arguments(mine)): assert lesson.train_little(ids, **sizes)[1] == pytest.approx(plain, abs=1e-4)
    with lesson.swap('gpt.Block.forward', lesson_gpt.first_arguments(parallel)): assert lesson.train_little(ids, **sizes)[1] != pytest.approx(plain, abs=1e-4)


# --- the lens ----------------------------------------------------------------------------------------------------------

def test_stream_is_what_the_blocks_hand_on_and_ends_in_the_models_own_scores():
    model, ids = lesson_gpt.toy_model(3, n_layer=3, n_embd=8), [1, 5, 0, 2]
    x = model.embed(torch.tensor([ids]))
    stream = lesson_gpt.watch_stream(model, ids)
    for row, block in zip(stream, [*model.transformer.h, None]):
        assert torch.equal(row, x[0])
        if block: x = block(x, model.cos[:4], model.sin[:4])
    assert torch.allclose(lesson_gpt.lens(model, ids)[-1], model(torch.tensor([ids]))[0], atol=1e-5)
    assert not any(block._forward_hooks for block in model.transformer.h)


def lens_of(text):
    tok = Tokenizer.train(['the cat sat on the mat. the <b> dog "ran". ' * 5], 290)
    return lesson_gpt.LogitLens(lesson_gpt.toy_model(0, n_layer=2, n_embd=8, vocab_size=tok.vocab_size), tok, text)


def test_logit_lens_shows_the_models_guesses_and_its_controls_the_pages():
    look = lens_of('the cat sat')
    best = look.model(torch.tensor([look.tokenizer.encode('the cat sat')]))[0].softmax(-1).max(-1)
    assert [place[0] for place in look.guesses[-1]] == [(look.tokenizer.decode([i]), pytest.approx(p, abs=1e-5)) for i, p in zip(best.indices.tolist(), best.values.tolist())]
    box, token, view = look.live().children
    token.value = 2
    assert view.value == look.grid(2) + look.bars(2) and look.bars(2) in look.static()
    before = view.value
    box.value = 'the mat.'
    assert view.value == look.grid(0) + look.bars(0) != before and token.max == len(look.pieces) - 1
