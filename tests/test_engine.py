"The engine against the plain loop, and what a sample may and may not depend on"
import numpy as np
import pytest
import torch

from nanochat.common import NanochatError
from nanochat.engine import Engine, TextStream, choose_tokens, readable_text, sample_key, uniform
from nanochat.gpt import GPT, GPTConfig, RECIPES
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["What is 12 times 12? 🙂 né " * 20], 300)
SPECIAL, V = TOKENIZER.special, TOKENIZER.vocab_size


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(3, vocab_size=TOKENIZER.vocab_size, sequence_len=96, n_embd=64, n_head=4, n_kv_head=2)).eval().requires_grad_(False)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.12)  # zero initialisation would hide mistakes
    return model


def deaf(model, **options):
    "An engine that no token stops"
    engine = Engine(model, TOKENIZER, **options)
    engine.notable[:] = False
    return engine


def naive(model, ids, n):
    ids = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(n): ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0].tolist()


def ragged(n, seed=0, low=1, high=50):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, rng.integers(low, high)).tolist() for _ in range(n)]


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_equals_recomputing_everything(model, slots):
    prompts = ragged(9)
    found = deaf(model, max_batch=slots).generate(prompts, max_tokens=15, temperature=0)
    assert [s.ids for [s] in found] == [naive(model, p, 15)[len(p):] for p in prompts]
    assert all(s.mask == [1] * 15 and not s.finished for [s] in found)


SWITCHES = {name: {name: value} for name, value in RECIPES["modern"].items()} | {"modern": dict(recipe="modern"), "modern, own heads": dict(recipe="modern", n_kv_head=4)}


def switched(fields):
    "A model with some switches on and no zeros; its short windows are 32 tokens wide"
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(5, vocab_size=TOKENIZER.vocab_size, sequence_len=96, n_embd=64, n_head=4, **dict(n_kv_head=2) | fields)).eval().requires_grad_(False)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.12 if parameter.ndim > 1 else .7)
    return model


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
def test_greedy_equals_recomputing_everything_for_every_switch(fields):
    model, prompts = switched(fields), [[7], *ragged(7, high=80)]
    expected = [naive(model, p, 14)[len(p):] for p in prompts]
    for slots in (1, 3, 8):  # with few slots most rows wait, and take over slots and gaps that others leave
        assert [s.ids for [s] in deaf(model, max_batch=slots).generate(prompts, max_tokens=14, temperature=0)] == expected
    engine = deaf(model)
    first = engine.submit(prompts[1], 2, 14, temperature=0)
    for _ in range(3): engine.step()
    late = [engine.submit(p, 2, 14, temperature=0)[1] for p in prompts[2:]]  # the cache grows while rows are at work
    while engine.busy: engine.step()
    assert [row.ids for row in (first[1], *late)] == expected[1:]


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
def test_an_engine_in_bfloat16_leaves_a_float32_model_as_it_is(fields):
    model = switched(fields)
    engine, before = deaf(model, dtype=torch.bfloat16), [p.clone() for p in model.parameters()]
    [[sample]] = engine.generate([[5, 6, 7]], max_tokens=6, temperature=0)
    assert len(sample.ids) == 6 and all(p.dtype == torch.float32 and torch.equal(p, q) for p, q in zip(model.parameters(), before))
    shared = deaf(engine.weights, dtype=torch.bfloat16)
    assert shared.generate([[5, 6, 7]], max_tokens=6, temperature=0)[0][0].ids == sample.ids and shared.weights.lm_head is engine.weights.lm_head


def test_small_prefill_passes_change_nothing(model):
    prompts, engine = ragged(9), deaf(model, max_batch=4)
    engine.prefill_tokens = 60
    assert [s.ids for [s] in engine.generate(prompts, max_tokens=8, temperature=0)] == [s.ids for [s] in deaf(model).generate(prompts, max_tokens=8, temperature=0)]


def test_sample_does_not_depend_on_company(model):
    prompts = ragged(7, seed=3)
    alone = deaf(model).generate(prompts[:1], num_samples=3, max_tokens=12, seed=5)[0]
    for slots in (2, 5, 21):
        crowd = deaf(model, max_batch=slots).generate(prompts, num_samples=3, max_tokens=12, seed=5)[0]
        assert [s.ids for s in crowd] == [s.ids for s in alone]
    more = deaf(model).generate(prompts[:1], num_samples=8, max_tokens=12, seed=5)[0]
    assert [s.ids for s in more[:3]] == [s.ids for s in alone], "asking for more samples changed the first ones"
    mixed = deaf(model, max_batch=4)
    [row] = mixed.submit(prompts[0], 1, 12, seed=5)
    others = [mixed.submit(p, 2, 9, temperature=t, top_k=k, seed=1, index=i) for i, (p, t, k) in enumerate(zip(prompts[1:], (0, .5, 2., 1., .1, .7), (None, 1, 200, 3, 50, 0)))]
    while mixed.busy: mixed.step()
    assert row.ids == alone[0].ids and all(len(r.ids) == 9 for group in others for r in group)


def test_samples_of_a_prompt_differ_from_the_first_token(model):
    samples = deaf(model).generate(ragged(1), num_samples=16, max_tokens=4, temperature=1.5, top_k=None)[0]
    assert len({s.ids[0] for s in samples}) > 4 and len({tuple(s.ids) for s in samples}) == 16


def test_same_seed_same_samples_other_seed_others(model):
    engine = deaf(model)
    first, again, other = (engine.generate(ragged(2), num_samples=2, max_tokens=10, seed=s) for s in (1, 1, 2))
    assert first == again and first != other


def test_sampling_follows_the_softmax():
    logits, n = torch.tensor([2., 1., 0., -1., 3.]), 20_000
    noise = uniform(np.array([sample_key(3, i) for i in range(n)], np.uint64), np.zeros(n, np.int64))
    for temperature, k in ((1., 0), (.5, 5), (1., 2), (2., 3)):
        kept = logits.clone()
        if k: kept[logits.argsort(descending=True)[k:]] = -torch.inf
        found = np.bincount(choose_tokens(logits.expand(n, 5), np.full(n, temperature), np.full(n, k), noise), minlength=5) / n
        assert np.abs(found - (kept / temperature).softmax(-1).numpy()).max() < .015


def test_extreme_noise_and_infinite_logits_stay_within_the_candidates():
    logits = torch.tensor([[1., -torch.inf, 0., -torch.inf]]).expand(4, 4)
    noise = np.array([0., .5, np.nextafter(1., 0), .999999])
    assert set(choose_tokens(logits, np.full(4, 1e-4), np.full(4, 4), noise)) == {0}
    assert set(choose_tokens(logits, np.full(4, 1.), np.full(4, 0), noise)) <= {0, 2}


def scripted(model, monkeypatch, ids):
    "An engine whose model, at temperature 0, says `ids` wherever nothing is forced"
    engine = Engine(model, TOKENIZER)
    import nanochat.engine as module
    said = iter(ids)

    def say(logits, *rest):
        return np.array([next(said) if not row.forced else 0 for row in engine.rows])
    monkeypatch.setattr(module, "choose_tokens", say)
    return engine


def test_tool_result_is_forced_and_masked(model, monkeypatch):
    call = [SPECIAL["<|python_start|>"], *TOKENIZER.encode("48/2"), SPECIAL["<|python_end|>"]]
    end = TOKENIZER.encode("It is 24.")
    [[sample]] = scripted(model, monkeypatch, call + end + [SPECIAL["<|assistant_end|>"]]).generate([[TOKENIZER.bos]], max_tokens=60)
    forced = [SPECIAL["<|output_start|>"], *TOKENIZER.encode("24"), SPECIAL["<|output_end|>"]]
    assert sample.ids == call + forced + end and sample.finished
    assert sample.mask == [1] * len(call) + [0] * len(forced) + [1] * len(end)
    assert readable_text(TOKENIZER, sample.ids) == "<<48/2=24>>It is 24."


@pytest.mark.parametrize("expression", ["import os", "1/0", "2**9"])
def test_failed_tool_call_forces_nothing(model, monkeypatch, expression):
    words = [SPECIAL["<|python_start|>"], *TOKENIZER.encode(expression), SPECIAL["<|python_end|>"], *TOKENIZER.encode("x"), SPECIAL["<|bos|>"]]
    [[sample]] = scripted(model, monkeypatch, words).generate([[TOKENIZER.bos]], max_tokens=60)
    assert sample.ids == words[:-1] and all(sample.mask) and sample.finished
    assert readable_text(TOKENIZER, sample.ids) == f"<<{expression}>>x"


def test_stray_tool_end_and_tools_off(model, monkeypatch):
    words = [SPECIAL["<|python_end|>"], *TOKENIZER.encode("1+1"), SPECIAL["<|assistant_end|>"]]
    assert scripted(model, monkeypatch, words).generate([[0]])[0][0].ids == words[:-1]
    words = [SPECIAL["<|python_start|>"], *TOKENIZER.encode("1+1"), SPECIAL["<|python_end|>"], SPECIAL["<|assistant_end|>"]]
    assert scripted(model, monkeypatch, words).generate([[0]], tools=False)[0][0].ids == words[:-1]


def test_limits_end_a_sample_unfinished(model):
    engine = deaf(model)
    [[full]], [[none]] = engine.generate([[5] * 96], max_tokens=50), engine.generate([[5]], max_tokens=0)
    assert (len(full.ids), full.finished, none.ids) == (1, False, [])
    [[edge]] = engine.generate([[5] * 90], max_tokens=50, temperature=0)
    assert edge.ids == naive(model, [5] * 90, 7)[90:], "the whole of the cache is used, to the last position"
    assert not engine.busy


@pytest.mark.parametrize("prompt, words", [([], "no tokens"), ([1] * 97, "do not fit"), ([V], f"knows {V}"), ([-1], "knows")])
def test_bad_prompts_are_refused_in_words(model, prompt, words):
    engine = Engine(model, TOKENIZER)
    with pytest.raises(NanochatError, match=words): engine.generate([prompt])
    assert not engine.busy


def test_cache_grows_while_rows_are_at_work(model):
    engine = deaf(model)
    [short] = engine.submit([7] * 3, 1, 40, temperature=0)
    for _ in range(5): engine.step()
    small = engine.cache
    long = engine.submit([9] * 60, 5, 30, temperature=0)
    while engine.busy: engine.step()
    assert engine.cache is not small and engine.cache.max_len > small.max_len
    assert short.ids == naive(model, [7] * 3, 40)[3:] and all(row.ids == naive(model, [9] * 60, 30)[60:] for row in long)


def test_stream_gives_the_tokens_of_generate_and_frees_its_slot(model):
    engine, [prompt] = deaf(model), ragged(1)
    [[sample]] = engine.generate([prompt], max_tokens=12, seed=3)
    assert [token for token, _ in engine.stream(prompt, max_tokens=12, seed=3)] == sample.ids
    half = engine.stream(prompt, max_tokens=12, seed=3)
    next(half)
    assert engine.busy
    assert engine.generate([prompt], max_tokens=12, seed=3)[0][0].ids == sample.ids, "a batch runs while a stream is open"
    assert [token for token, _ in half] == sample.ids[1:] and not engine.busy
    left = engine.stream(prompt, max_tokens=12)
    next(left); left.close()
    assert not engine.busy


def test_cancelled_rows_leave_the_others_alone(model):
    engine, prompts = deaf(model, max_batch=3), ragged(6, seed=8)
    rows = [engine.submit(p, 1, 20, temperature=0, index=i)[0] for i, p in enumerate(prompts)]
    for _ in range(4): engine.step()
    engine.cancel(rows[0]); engine.cancel(rows[4])
    while engine.busy: engine.step()
    assert all(rows[i].ids == naive(model, prompts[i], 20)[len(prompts[i]):] for i in (1, 2, 3, 5)) and len(rows[0].ids) == 4 and not rows[4].ids


def test_failure_while_rows_join_is_reported_as_itself_and_survived(model, monkeypatch):
    engine, prompts = deaf(model, max_batch=2), ragged(5, seed=4, low=2)
    expected = engine.generate(prompts, max_tokens=6, temperature=0)
    join, fuse = Engine._join, [None, None, RuntimeError("out of memory")]  # the third time, when rows have ended and left holes

    def fail(self, rows, slots):
        if fuse and (error := fuse.pop(0)): raise error
        join(self, rows, slots)
    monkeypatch.setattr(Engine, "_join", fail)
    with pytest.raises(RuntimeError, match="out of memory"): engine.generate(prompts, max_tokens=6, temperature=0)
    assert not engine.busy
    assert engine.generate(prompts, max_tokens=6, temperature=0) == expected


def test_engine_sees_new_weights_of_a_model_in_training():
    torch.manual_seed(1)
    config = GPTConfig.from_depth(2, vocab_size=TOKENIZER.vocab_size, sequence_len=32, n_embd=32, n_head=2)
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(config)
        for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.3)
        engine = deaf(model, dtype=dtype)
        before = engine.generate([[1, 2, 3]], max_tokens=8, temperature=0)
        with torch.no_grad(): model.lm_head.weight.mul_(-1)
        after = engine.generate([[1, 2, 3]], max_tokens=8, temperature=0)
        assert before != after and model.compute_dtype == torch.float32
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_text_stream_never_cuts_a_character():
    text = "a🙂né 漢字 👩‍👩‍👧 end"
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in TOKENIZER.encode(text)]
    assert "".join(pieces) + stream.finish() == text and not any("\ufffd" in p for p in pieces)
    stream = TextStream(TOKENIZER)
    cut = TOKENIZER.encode("🙂")[:-1]
    assert [stream.push(i) for i in cut] == [""] * len(cut) and stream.finish() == "\ufffd"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_greedy_equals_recomputing_everything_on_a_gpu(model):
    import copy
    gpu = copy.deepcopy(model).cuda()
    prompts = ragged(9)
    found = deaf(gpu, max_batch=4).generate(prompts, max_tokens=15, temperature=0)
    assert [s.ids for [s] in found] == [s.ids for [s] in deaf(model).generate(prompts, max_tokens=15, temperature=0)]
