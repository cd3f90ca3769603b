"The engine against the plain loop, and what a sample may and may not depend on"
import copy

import numpy as np
import pytest
import torch

from nanochat.attention import Linear
from nanochat.common import NanochatError
from nanochat.engine import Engine, Settings, TextStream, choose_tokens, penalise, readable_text, sample_key, uniform
from nanochat.gpt import GPT, GPTConfig, Int8Linear, PackedLinear, RECIPES, in_few_sizes
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
    engine.notable[:], engine.stops = False, set()
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


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("fields", [{}, dict(recipe="modern")], ids=["classic", "modern"])
def test_the_packed_twin_gives_the_logits_of_the_training_path(fields, rows):
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(3, vocab_size=256, sequence_len=64, n_embd=128, n_head=4, n_kv_head=2, **fields)).eval().requires_grad_(False)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.08 if parameter.ndim > 1 else .7)
    twin, ids = model.packed(), torch.randint(256, (rows, 40))
    assert type(twin.lm_head).__name__ == "PackedLinear" and all(a is b for a, b in zip(twin.parameters(), model.parameters()))
    cache, plain, found = twin.make_cache(rows, 40), model(ids), []
    for piece in ids[:, :20], *ids[:, 20:].split(1, dim=1): found.append(twin(piece, cache=cache))
    torch.testing.assert_close(torch.cat(found, 1), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 40])  # few rows are multiplied in 8 bits, for many the weights are widened first
def test_a_layer_of_8_bits_is_off_by_its_rounding_alone(rows):
    torch.manual_seed(0)
    linear, x = Linear(96, 256).requires_grad_(False), torch.randn(rows, 1, 96)
    small = Int8Linear(linear)
    step = linear.weight.abs().amax(1) / 127
    assert small.weight.dtype == torch.int8 and small.weight.abs().max() == 127
    expected = linear(x)
    off = (small(x) - expected).abs() / (step * x.norm(dim=-1, keepdim=True))  # a sum of 96 roundings, each below half a step
    assert small(x).shape == expected.shape and off.max() < 2, off.max()
    assert (Int8Linear(zeroed(linear))(x) == 0).all()


def zeroed(linear):
    linear = copy.deepcopy(linear)
    linear.weight.zero_()
    return linear


def test_prompts_are_read_where_the_last_ones_were(model):
    engine, prompts = deaf(model), ragged(5)
    engine.generate(ragged(5, seed=1), max_tokens=2)
    engine.generate([[7] * 60] + prompts, max_tokens=2)
    memory = engine.desk.k.data_ptr()
    for batch in prompts, prompts[:1], prompts[::-1]:
        assert [s.ids for [s] in engine.generate(batch, max_tokens=6, temperature=0)] == [naive(model, p, 6)[len(p):] for p in batch]
        assert engine.desk.k.data_ptr() == memory
    crowded = deaf(model, max_batch=2)
    assert [s.ids for [s] in crowded.generate(prompts, max_tokens=6, temperature=0)] == [naive(model, p, 6)[len(p):] for p in prompts]


def test_products_meet_few_numbers_of_rows():
    weight, met = torch.randn(8, 6, dtype=torch.float64), []
    def product(rows): met.append(rows.numel() // rows.size(-1)); return rows @ weight.T
    for n in range(1, 600):
        x = torch.randn(1, n, 6, dtype=torch.float64)
        assert torch.allclose(in_few_sizes(product, x), x @ weight.T) and n <= met[-1] < n * 5 / 4
    assert set(range(1, 9)) < set(met) and len(set(met)) < 8 + 4 * 7, sorted(set(met))


@pytest.mark.parametrize("layer", [PackedLinear, Int8Linear])
def test_onednn_meets_few_numbers_of_rows(layer):
    linear, met = Linear(96, 128).requires_grad_(False), set()
    small = layer(linear)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        for n in range(513, 545): assert small(torch.randn(1, n, 96)).shape == (1, n, 128)
    for event in seen.events():
        if event.name in ("mkldnn::_linear_pointwise", "aten::mkldnn_linear", "aten::linear"): met.add(tuple(event.input_shapes[0])[-2])
    assert met == {640}, met


def size_of(model): return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_writes_with_a_model_of_8_bits_what_the_model_says(dtype):
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(2, vocab_size=384, sequence_len=64, n_embd=128, n_head=2)).requires_grad_(False)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.08)
    ids = torch.randint(256, (2, 30))
    plain, bytes_before = model(ids), size_of(model)
    assert model.to_int8() is model and size_of(model) < .45 * bytes_before # a quarter for the matrices; the embedding stays
    assert {type(child) for child in model.modules()} >= {Int8Linear} and type(model.lm_head) is Int8Linear
    assert 0 < (model(ids) - plain).abs().mean() < .05 * plain.abs().mean()
    prompts = ragged(5)
    greedy = deaf(model, dtype=dtype).generate(prompts, max_tokens=8, temperature=0)
    model.compute_dtype = dtype
    for prompt, [sample] in zip(prompts, greedy):
        logits = model(torch.tensor([prompt + sample.ids]))[0, len(prompt) - 1:-1, :V].float()
        chosen = logits.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        assert (chosen > logits.amax(1) - .1).all()  # between near equals, products of another number of rows may choose otherwise


def test_an_engine_takes_weights_that_training_has_changed():
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(2, vocab_size=V, sequence_len=64, n_embd=128, n_head=2)).requires_grad_(False)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.12)
    engine, prompts = deaf(model), [[5, 6, 7], [8] * 9]
    for _ in range(2):
        assert [s.ids for [s] in engine.generate(prompts, max_tokens=8, temperature=0)] == [naive(model, p, 8)[len(p):] for p in prompts]
        weights = engine.weights
        engine.refresh()
        assert engine.weights is weights, "nothing has changed, nothing is packed again"
        model.transformer.h[1].mlp.c_fc.weight.neg_()


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
    assert choose_tokens(logits.flip(1), np.full(4, 1.), np.full(4, 0), noise)[0] == 1, "noise 0 takes the first candidate that has any weight"


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


DIALS = [(0., 0, 1., 0.), (1., 0, 1., 0.), (.7, 5, 1., 0.), (1.3, 0, .8, 0.), (1., 0, 1., .1), (1.5, 20, .6, .02), (.4, 9, .95, 0.), (2., 500, 1., 0.), (1., 1, .3, .9)]


def dials(rows):
    return dict(zip(("temperature", "top_k", "top_p", "min_p"), map(np.array, zip(*rows))))


@pytest.mark.parametrize("row", DIALS[1:])
def test_sampling_settings_mean_what_they_mean_in_transformers(row):
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    temperature, k, p, least = row
    scores, n = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2, 40_000
    warpers = [TemperatureLogitsWarper(temperature), *([TopKLogitsWarper(k)] if k else []), TopPLogitsWarper(p), MinPLogitsWarper(least)]
    expected = LogitsProcessorList(warpers)(None, scores)[0].softmax(-1).numpy()
    found = np.bincount(choose_tokens(scores.expand(n, 50), noise=(np.arange(n) + .5) / n, **dials([row] * n)), minlength=50) / n
    assert np.abs(found - expected).max() < 2 / n and ((found > 0) <= (expected > 0)).all()


def test_a_row_is_chosen_for_alone_as_among_rows_with_other_settings():
    scores, rng = torch.randn(90, 400, generator=torch.Generator().manual_seed(1)), np.random.default_rng(0)
    rows, noise = [DIALS[i] for i in rng.integers(0, len(DIALS), 90)], rng.random(90)
    together = choose_tokens(scores, noise=noise, **dials(rows))
    assert together.tolist() == [choose_tokens(scores[i:i+1], noise=noise[i:i+1], **dials(rows[i:i+1])).item() for i in range(90)]


def test_repetition_penalty_is_that_of_transformers_and_touches_only_its_row(model):
    from transformers import RepetitionPenaltyLogitsProcessor
    def penalised(ids, n, penalty):
        ids, process = torch.tensor([ids]), RepetitionPenaltyLogitsProcessor(penalty)
        with torch.no_grad():
            for _ in range(n): ids = torch.cat([ids, process(ids, model(ids)[:, -1]).argmax(-1, keepdim=True)], 1)
        return ids[0].tolist()
    scores, seen = torch.randn(1, V, generator=torch.Generator().manual_seed(0)), torch.tensor([[3, 8, 8, 40, V - 1]])
    marked = torch.zeros(1, V, dtype=torch.bool).index_fill(1, seen[0], True)
    torch.testing.assert_close(penalise(scores, marked, np.array([1.7])), RepetitionPenaltyLogitsProcessor(1.7)(seen, scores), rtol=0, atol=0)
    prompts, engine, penalties, lengths = ragged(8, seed=6), deaf(model, max_batch=3), (1., 1.3, 2., 1., 5., .8, 2., 3.), (4, 18, 9, 15, 8, 6, 30, 12)
    rows = [engine.submit(p, 1, n, temperature=0, repetition_penalty=x)[0] for p, x, n in zip(prompts, penalties, lengths)]  # rows end at different times, and others move
    while engine.busy: engine.step()
    expected = [(penalised(p, n, x) if x != 1 else naive(model, p, n))[len(p):] for p, x, n in zip(prompts, penalties, lengths)]
    assert [row.ids for row in rows] == expected
    assert expected[1] != naive(model, prompts[1], 18)[len(prompts[1]):]


def test_logprobs_are_the_models_own_at_every_token(model):
    engine, prompts = deaf(model, max_batch=3), ragged(6, seed=2, low=2)
    wanted = (None, 0, 3, None, 5, 1)
    rows = [engine.submit(p, 1, 10, temperature=t, top_p=.9, repetition_penalty=1.2, logprobs=n, seed=4, index=i)[0] for i, (p, n, t) in enumerate(zip(prompts, wanted, (1., .5, 2., 0, 0, 1.)))]
    while engine.busy: engine.step()
    for prompt, row, n in zip(prompts, rows, wanted):
        logs = model(torch.tensor([prompt + row.ids]))[0, len(prompt) - 1:-1].log_softmax(-1)
        if n is None: assert row.logprobs == row.likeliest == []; continue
        torch.testing.assert_close(torch.tensor(row.logprobs), logs[torch.arange(10), row.ids], rtol=1e-4, atol=1e-4)
        for found, position in zip(row.likeliest, logs):
            assert len(found) == n and list(found) == position.topk(n).indices.tolist()
            torch.testing.assert_close(torch.tensor(list(found.values())), position.topk(n).values, rtol=1e-4, atol=1e-4)


def test_logprobs_leave_out_the_stop_token_as_the_ids_do(model, monkeypatch):
    words = [*TOKENIZER.encode("ab"), SPECIAL["<|assistant_end|>"]]
    [[sample]] = scripted(model, monkeypatch, words).generate([[TOKENIZER.bos]], logprobs=2)
    assert len(sample.ids) == len(sample.logprobs) == len(sample.likeliest) == len(words) - 1


def test_an_echo_scores_the_prompts_own_tokens_whatever_is_read_beside_them(model):
    engine, prompts = deaf(model, max_batch=3), [[7], *ragged(5, seed=2, low=20)]
    engine.piece_tokens = engine.prefill_tokens = 12
    list(engine.stream(prompts[2], 1))  # its beginning is known now, and must be read again all the same
    wanted = (1, 0, 3, None, 2, 1)
    groups = [engine.submit(p, 2, 4, logprobs=n, echo=i != 4, seed=i) for i, (p, n) in enumerate(zip(prompts, wanted))]
    while engine.busy: engine.step()
    for i, (prompt, n, rows) in enumerate(zip(prompts, wanted, groups)):
        logs = model(torch.tensor([prompt]))[0, :-1].log_softmax(-1)
        for row in rows:
            if n is None or i == 4: assert row.prompt_logprobs == row.prompt_likeliest == []; continue
            torch.testing.assert_close(torch.tensor(row.prompt_logprobs), logs[torch.arange(len(prompt) - 1), prompt[1:]], rtol=1e-4, atol=1e-4)
            assert [list(top) for top in row.prompt_likeliest] == logs.topk(n).indices.tolist()
    [[sample]] = engine.generate([prompts[2]], max_tokens=1, logprobs=1, echo=True)
    assert sample.prompt_logprobs == pytest.approx(groups[2][0].prompt_logprobs, abs=1e-4)


TEXTS = ["Where is the 🙂 now? né, né and 漢字", "aaaaab aab", "👩‍👩‍👧 one\n\ntwo\n\n\nthree"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stop_text_ends_a_stream_exactly_before_it_whatever_the_tokens(text):
    def cut(stops): return text[:min(((at + len(s), at) for s in stops if (at := text.find(s)) >= 0), default=(0, len(text)))[1]]  # the first that is complete
    rng = np.random.default_rng(0)
    for _ in range(200):
        stops = [text[a:a + n] for a, n in zip(rng.integers(0, len(text), 3), rng.integers(1, 7, 3))] + ["\nUser:", text[-2:] + "!"]
        stops = stops[rng.integers(0, 5):]
        for ids in (TOKENIZER.encode(text), list(text.encode())):  # the first 256 tokens are the bytes
            stream, said = TextStream(TOKENIZER, stops), ""
            for i in ids:
                said += stream.push(i)
                assert cut(stops).startswith(said) and "\ufffd" not in said
            assert said + stream.finish() == cut(stops) == readable_text(TOKENIZER, ids, stops)
            assert (stream.stopped is not None) == (cut(stops) != text) and stream.stopped in (None, *stops)


def test_a_stop_text_ends_its_row_only(model, monkeypatch):
    words = TOKENIZER.encode("It is né 🙂🙂. Then more")
    [[sample]] = scripted(model, monkeypatch, words).generate([[TOKENIZER.bos]], stop=["never", "🙂. T"], max_tokens=60)
    assert sample.finished and sample.stopped == "🙂. T" and readable_text(TOKENIZER, sample.ids, ["🙂. T"]) == "It is né 🙂"
    assert TOKENIZER.decode(sample.ids).startswith("It is né 🙂🙂. T") and len(sample.ids) < len(words)
    monkeypatch.undo()
    engine, prompts = deaf(model), ragged(4, seed=9)
    free = engine.generate(prompts, max_tokens=20, temperature=0)
    stops = [None, TOKENIZER.decode(free[1][0].ids[6:8]), "nobody says this", None]
    rows = [engine.submit(p, 1, 20, temperature=0, stop=s)[0] for p, s in zip(prompts, stops)]
    while engine.busy: engine.step()
    assert [r.ids for i, r in enumerate(rows) if i != 1] == [free[i][0].ids for i in (0, 2, 3)] and rows[1].ids == free[1][0].ids[:len(rows[1].ids)]
    assert len(rows[1].ids) <= 8 and rows[1].stopped == stops[1] and [r.finished for r in rows] == [False, True, False, False]


def test_a_stop_text_that_a_tool_writes_counts(model, monkeypatch):
    call = [SPECIAL["<|python_start|>"], *TOKENIZER.encode("48/2"), SPECIAL["<|python_end|>"]]
    [[sample]] = scripted(model, monkeypatch, call + TOKENIZER.encode("no more")).generate([[TOKENIZER.bos]], stop="=24", max_tokens=60)
    assert sample.stopped == "=24" and readable_text(TOKENIZER, sample.ids, "=24") == "<<48/2"


@pytest.mark.parametrize("settings", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=-2), dict(top_p=0), dict(top_p=1.1), dict(min_p=2), dict(min_p=-.1),
                                      dict(repetition_penalty=0), dict(stop=["a", ""]), dict(logprobs=-1)], ids=str)
def test_senseless_settings_are_refused_by_name(model, settings):
    engine = Engine(model, TOKENIZER)
    with pytest.raises(NanochatError, match=next(iter(settings))): engine.generate([[1, 2]], **settings)
    assert not engine.busy and Settings(top_k=None, stop="x").stop == ("x",)


def test_samples_of_a_prompt_are_read_once(model):
    engine = deaf(model, max_batch=4)
    engine.generate([[5] * 20, [6] * 30], num_samples=9, max_tokens=3)
    assert engine.counts == dict(read=19 + 29, reused=0, shared=8 * (19 + 29), computed=2 * 29, written=2 * 9 * 3)


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
def test_a_known_beginning_is_reused_and_changes_nothing(fields):
    model = switched(fields)
    engine, [talk] = deaf(model), ragged(1, seed=5, low=20, high=21)
    for turn in range(3):  # each prompt is the talk so far and a few tokens more
        before = engine.counts["read"], engine.counts["reused"]
        answer = [token for token, _ in engine.stream(talk, 8, temperature=0)]
        assert answer == naive(model, talk, 8)[len(talk):]
        read, reused = engine.counts["read"] - before[0], engine.counts["reused"] - before[1]
        assert (read, reused) == ((19, 0) if turn == 0 else (5, len(talk) - 6))  # the last token of the answer, and all but the last of the five new ones
        talk = talk + answer + [3, 1, 4, 1, 5]
    forks = [talk[:40] + more for more in ([7] * 9, [8] * 3, [9])] + ragged(3, seed=7) + [talk[:25], [2]]  # some begin like it, and are read together with some that do not
    rows = [engine.submit(p, 1, 10, temperature=0)[0] for p in forks]
    while engine.busy: engine.step()
    assert [row.ids for row in rows] == [naive(model, p, 10)[len(p):] for p in forks]
    assert len(engine.memory.texts) > 1 and sum(len(ids) for ids, _ in engine.memory.texts) <= engine.memory.limit


def test_a_long_known_beginning_and_a_long_new_prompt_are_not_read_together(model):
    engine = deaf(model, max_len=960)  # all that the rotary tables have
    talk = [3, 1, 4, 1, 5, 9] * 100
    list(engine.stream(talk, 2, temperature=0))
    rows = [engine.submit(p, 1, 3, temperature=0)[0] for p in (talk + [7], [8] * 500)]
    while engine.busy: engine.step()
    assert [row.ids for row in rows] == [naive(model, p, 3)[len(p):] for p in (talk + [7], [8] * 500)] and engine.counts["reused"] == 600


def test_logits_after_a_known_beginning_are_those_of_reading_it_all(model):
    [talk], found = ragged(1, low=60, high=61), []
    for warm in (talk[:40], None):
        engine = deaf(model)
        if warm: list(engine.stream(warm, 1))
        [row] = engine.submit(talk, 1, 5, temperature=0, logprobs=V)
        while engine.busy: engine.step()
        found.append(torch.tensor([[at[i] for i in range(V)] for at in row.likeliest]))
        assert engine.counts["reused"] == (40 if warm else 0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_memory_of_texts_is_bounded_and_forgets_the_oldest(model):
    engine = deaf(model, memory_tokens=100)
    for i in range(6): list(engine.stream([i] * 30, 6))
    assert [len(ids) for ids, _ in engine.memory.texts] == [35, 35] and [int(ids[0]) for ids, _ in engine.memory.texts] == [4, 5]
    list(engine.stream([4] * 30 + [1], 2))
    assert {int(ids[0]) for ids, _ in engine.memory.texts} == {4}, "the text that was not used for longest goes first"
    none = deaf(model, memory_tokens=0)
    for _ in range(2): list(none.stream([5] * 30, 6))
    assert none.counts["reused"] == 0 and not none.memory.texts
    left = deaf(model)
    half = left.stream([5] * 30, 6); next(half); half.close()
    assert not left.memory.texts


def test_texts_on_the_shelf_never_lie_on_each_other(model):
    engine, drawn = deaf(model, memory_tokens=150), np.random.default_rng(0)
    for i in range(40):
        list(engine.stream(drawn.integers(1, V, drawn.integers(12, 61)).tolist(), 6, seed=i))
        shelf, texts = engine.memory.shelf, engine.memory.texts
        for ids, start in texts:
            read = engine.weights.make_cache(1, len(ids))
            with torch.no_grad(): engine.weights(torch.tensor(ids)[None], cache=read)
            for part in "kv": torch.testing.assert_close(getattr(shelf.cut(0, start, len(ids)), part), getattr(read, part), rtol=1e-4, atol=1e-4)
        assert shelf.max_len == 150
    assert len({start for _, start in texts}) == len(texts) > 1
    memory = shelf.k.data_ptr()
    list(engine.stream([5] * 50, 6))
    assert engine.memory.shelf.k.data_ptr() == memory


def test_what_old_weights_have_read_is_forgotten():
    torch.manual_seed(1)
    model = GPT(GPTConfig.from_depth(2, vocab_size=TOKENIZER.vocab_size, sequence_len=64, n_embd=32, n_head=2))
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.3)
    engine = deaf(model)
    list(engine.stream([5] * 30, 6, temperature=0))
    weight = model.transformer.h[0].attn.c_v.weight
    for change in (lambda: weight[3, 5].add_(9), lambda: weight.data.mul_(-1)):
        with torch.no_grad(): change()
        assert [token for token, _ in engine.stream([5] * 30, 6, temperature=0)] == naive(model, [5] * 30, 6)[30:]
        assert engine.counts["reused"] == 0
    list(engine.stream([5] * 30, 6, temperature=0))
    assert engine.counts["reused"] == 29


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
def test_a_prompt_read_in_pieces_gives_the_same_answer(fields):
    model, prompts = switched(fields), ragged(5, seed=11, low=30, high=80)
    expected = [naive(model, p, 9)[len(p):] for p in prompts]
    for tokens in (1, 7, 64):
        engine = deaf(model, max_batch=3)
        engine.prefill_tokens = tokens
        assert [s.ids for [s] in engine.generate(prompts, max_tokens=9, temperature=0)] == expected


def test_on_a_cpu_values_lie_as_their_reader_wants_them(model):
    engine = deaf(model)
    engine.submit([3] * 4, 1, 30)
    engine.step()
    engine.prefill_tokens = 8
    engine.submit([7] * 60, 1, 6)
    engine.step()
    if model.device.type == "cpu": assert engine.reading.cache.v.stride(-1) == 1 and engine.cache.v.stride(-2) == 1


def test_a_long_prompt_does_not_stall_the_rows_at_work(model, monkeypatch):
    engine, passes = deaf(model), []
    engine.prefill_tokens = 8
    running = [engine.submit([i] * 4, 1, 30, temperature=0)[0] for i in (3, 4)]
    engine.step()
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, cache=None: (passes[-1].append(idx.numel()), hidden(self, idx, cache))[1])
    late = [engine.submit(p, 1, 6, temperature=0)[0] for p in ([7] * 60, [8] * 20)]
    while engine.busy:
        passes.append([])
        at_work = [row for row in running if not row.done]
        lengths = [len(row.ids) for row in at_work]
        rows, _, _ = engine.step()
        assert [len(row.ids) for row in at_work] == [n + 1 for n in lengths], "every row at work gets a token in every step"
        assert len(passes[-1]) <= 2 and passes[-1][0] <= 8 and passes[-1][-1] == len(rows), "one piece of a prompt, then one token a row"
    assert sum(sum(p[:-1]) for p in passes) == 59 + 19
    monkeypatch.undo()
    assert [row.ids for row in late] == [naive(model, p, 6)[len(p):] for p in ([7] * 60, [8] * 20)] and all(len(row.ids) == 30 for row in running)


def test_pieces_are_small_only_while_somebody_waits_for_a_token(model, monkeypatch):
    engine, passes, hidden = deaf(model), [], GPT.hidden
    engine.piece_tokens = 8
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, cache=None: (passes.append(idx.size(1)), hidden(self, idx, cache))[1])
    engine.submit([7] * 60, 1, 40)
    engine.step()
    assert passes == [59, 1], "nobody waits: the prompt is read at once"
    engine.submit([8] * 40, 1, 3)
    engine.step()
    assert passes == [59, 1, 8, 1]


def test_a_prompt_cancelled_while_it_is_read_leaves_the_others_alone(model):
    engine = deaf(model)
    engine.prefill_tokens = 8
    [running] = engine.submit([3] * 4, 1, 30, temperature=0)
    engine.step()
    [gone], [kept] = engine.submit([7] * 60, 1, 6), engine.submit([8] * 20, 1, 6, temperature=0)
    for _ in range(3): engine.step()
    engine.cancel(gone)
    for _ in range(4): engine.step()
    assert kept.ids, "nothing more is read of the one that has gone: 19 tokens take three pieces, and join in the step after them"
    while engine.busy: engine.step()
    assert gone.ids == [] and kept.ids == naive(model, [8] * 20, 6)[20:] and running.ids == naive(model, [3] * 4, 30)[4:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_greedy_equals_recomputing_everything_on_a_gpu(model):
    import copy
    gpu = copy.deepcopy(model).cuda()
    prompts = ragged(9)
    found = deaf(gpu, max_batch=4).generate(prompts, max_tokens=15, temperature=0)
    assert [s.ids for [s] in found] == [s.ids for [s] in deaf(model).generate(prompts, max_tokens=15, temperature=0)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])])
def test_all_settings_together_with_pieces_and_memory(model, device):
    import copy
    engine, prompts = deaf(copy.deepcopy(model).to(device), max_batch=4), ragged(9, low=20)
    engine.prefill_tokens = 16
    options = dict(max_tokens=8, temperature=.8, top_k=None, top_p=.9, min_p=.01, repetition_penalty=1.2, logprobs=2, stop="never said", remember=True)
    first, again = (engine.generate(prompts, **options) for _ in range(2))
    assert [s.ids for [s] in first] == [s.ids for [s] in again] and all(len(s.logprobs) == len(s.likeliest) == 8 for [s] in first)
    assert engine.counts["reused"] > 100
