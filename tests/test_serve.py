"The chat command and the server: what they answer, refuse and survive"
import asyncio, contextlib, json, math, os, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import pytest
import torch

httpx, uvicorn = pytest.importorskip("httpx"), pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from nanochat.chat import Chat, best_stage, run_command
from nanochat.checkpoint import save_checkpoint
from nanochat.common import NanochatError, Run
from nanochat.engine import Engine, TextStream, readable_text
from nanochat.gpt import GPT, GPTConfig
from nanochat.serve import LARGEST_BODY, PATIENCE, SHORTEST_PIECE, Service, make_app, open_port, show_calls, token_name
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.train(["hello world, how are you? " * 40], 290)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(2, vocab_size=TOKENIZER.vocab_size, sequence_len=256, n_embd=32, n_head=2)).eval().requires_grad_(False)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.1)
    return model


@pytest.fixture(scope="module")
def home(model, tmp_path_factory):
    "A home with one run, whose sft stage is a random model"
    folder = tmp_path_factory.mktemp("home")
    before, os.environ["NANOCHAT_HOME"] = os.environ.get("NANOCHAT_HOME"), str(folder)
    run = Run.create("random")
    TOKENIZER.save(run.path("tokenizer"))
    save_checkpoint(run.path("sft"), 1, model, tokenizer=TOKENIZER)
    run.write_json(dict(stage="sft", status="complete", finished="now", seconds=0), "stages", "sft.json")
    yield folder
    os.environ.pop("NANOCHAT_HOME") if before is None else os.environ.update(NANOCHAT_HOME=before)


class Server:
    "The application on a free port, in a thread"
    def __init__(self, model, slots=4, queue=4, **options):
        self.service = Service(Engine(model, TOKENIZER, max_batch=slots), "tiny", queue)
        listening = open_port("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = make_app(self.service, **dict(chat_page=False) | options | (dict(origins=(f"127.0.0.1:{self.port}",)) if options.get("chat_page") else {}))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs=dict(sockets=[listening]), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started: time.sleep(.02)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)

    def post(self, headers=None, **fields):
        return httpx.post(self.url + "/v1/chat/completions", json=dict(messages=[dict(role="user", content="hello")], max_tokens=5) | fields, headers=headers, timeout=60)

    def idle(self, seconds=5):
        "Whether every slot is free within some seconds"
        end = time.time() + seconds
        while time.time() < end and (self.service.open or self.service.engine.busy): time.sleep(.05)
        return not self.service.open and not self.service.engine.busy


@pytest.fixture(scope="module")
def server(model):
    with Server(model) as server: yield server


def test_openai_client_whole_and_streamed(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    asked = dict(model="tiny", messages=[dict(role="system", content="Be kind."), dict(role="user", content="hello")], max_tokens=12, seed=3)
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason in ("length", "stop") and whole.usage.completion_tokens <= 12
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=dict(include_usage=True)))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert [m.id for m in client.models.list()] == ["tiny"]
    nothing = dict(temperature=None, top_p=None, n=None, stop=None, logprobs=None, max_completion_tokens=None, stream_options=None)  # sent as null
    renamed = dict(asked, messages=[dict(role="developer", content="Be kind."), *asked["messages"][1:]])
    assert client.chat.completions.create(**renamed, **nothing).choices[0].message.content == text
    with pytest.raises(openai.UnprocessableEntityError) as caught: client.chat.completions.create(**asked, temperature=9)
    assert caught.value.param == "temperature"


def test_answer_is_the_engines_own(server, model):
    prompt = TOKENIZER.render_for_completion([dict(role="user", content="hello")])
    [[sample]] = Engine(model, TOKENIZER).generate([prompt], max_tokens=9, temperature=.8, top_k=7, seed=5)
    body = server.post(max_tokens=9, temperature=.8, top_k=7, seed=5).json()
    assert body["usage"] == dict(prompt_tokens=len(prompt), completion_tokens=len(sample.ids), total_tokens=len(prompt) + len(sample.ids))
    assert body["choices"][0]["message"]["content"] == readable_text(TOKENIZER, sample.ids)


@pytest.mark.parametrize("fields, named", [
    (dict(temperature=2.5), "temperature"), (dict(temperature="warm"), "temperature"), (dict(top_k=201), "top_k"), (dict(max_tokens=0), "max_tokens"), (dict(max_tokens=5000), "max_tokens"),
    (dict(messages=[]), "messages"), (dict(messages="hi"), "messages"), (dict(messages=[{}]), "messages.0.role"), (dict(messages=[dict(role="user", content="hi")] * 501), "messages"),
    (dict(messages=[dict(role="user", content="")]), "messages.0.content"), (dict(messages=[dict(role="user", content="x" * 8001)]), "messages.0.content"), (dict(messages=[dict(role="user", content=[dict(type="image")])]), "messages.0.content"),
    (dict(messages=[dict(role=r, content="x" * 8000) for r in ("user", "assistant") * 2 + ("user",)]), "messages"), (dict(messages=[dict(role="assistant", content="x")]), "messages"),
    (dict(messages=[dict(role="user", content="a"), dict(role="user", content="b")]), "messages"), (dict(messages=[dict(role="user", content="z " * 300)]), "messages"), (dict(n=17), "n"), (dict(stream="perhaps"), "stream")])
def test_malformed_request_gets_422_with_the_field(server, fields, named):
    answer = server.post(**fields)
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["param"].startswith(named) and error["message"].startswith(named)


def test_bodies_that_are_not_json_or_too_large(server):
    path = server.url + "/v1/chat/completions"
    assert httpx.post(path, content=b"{", headers={"content-type": "application/json"}).status_code == 422

    def refused(content):
        try: return httpx.post(path, content=content).status_code == 413
        except httpx.TransportError: return True  # the server hung up while the rest was still coming
    assert refused(b"x" * (LARGEST_BODY + 1))
    assert refused(b"x" * (LARGEST_BODY // 20) for _ in range(40)), "without a declared length"
    assert httpx.get(server.url + "/health").json()["status"] == "ok"


def test_api_key_is_asked_for(model):
    with Server(model, api_key="sesame") as server:
        assert server.post().status_code == 401 and server.post({"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(server.url + "/v1/models").status_code == 401
        assert server.post({"Authorization": "Bearer sesame"}).status_code == 200
        assert httpx.get(server.url + "/health").status_code == 200


def slow(server, seconds=.03):
    "Make every step of a server's engine take a while"
    step = server.service.engine.step
    server.service.engine.step = lambda: (time.sleep(seconds), step())[1]
    server.service.engine.stops = set()
    server.service.engine.notable[:] = False


def test_full_line_is_refused_with_503_and_health_answers_meanwhile(model):
    with Server(model, slots=1, queue=1) as server:
        slow(server)
        with httpx.Client(timeout=60) as client:
            threads = [threading.Thread(target=lambda: server.post(max_tokens=60)) for _ in range(2)]
            for thread in threads: thread.start()
            while len(server.service.open) < 2: time.sleep(.01)
            start = time.time()
            refused, health = server.post(), client.get(server.url + "/health").json()
            assert time.time() - start < 1, "the web side must not wait for the engine"
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert (health["at_work"], health["waiting"]) == (1, 1)
            for thread in threads: thread.join()
        assert server.post().status_code == 200 and server.idle()


def test_leaving_client_frees_its_slot_streamed_and_whole(model):
    with Server(model, slots=2) as server:
        slow(server)
        asked = dict(messages=[dict(role="user", content="hello")], max_tokens=200)
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=asked | dict(stream=True), timeout=60) as answer: next(answer.iter_lines())
        assert server.idle(3)
        with pytest.raises(httpx.ReadTimeout): httpx.post(server.url + "/v1/chat/completions", json=asked, timeout=.3)
        assert server.idle(3)
        assert server.post(max_tokens=3).status_code == 200


def test_an_answer_that_nobody_reads_gives_its_place_back(model):
    service = Service(Engine(model, TOKENIZER, max_batch=2), queue_limit=2).start()

    async def stalled():
        jobs = [service.submit([[1, 2, 3]], max_tokens=4) for _ in range(4)]
        for _ in range(200):
            if not service.open: break
            await asyncio.sleep(.02)
        assert not service.open
        texts = ["".join([text async for _, text, _, _ in job.pieces()]) for job in jobs]
        assert texts[0] and texts == texts[:1] * 4, "the text is still there for a slow reader"
    asyncio.run(stalled())
    service.stop()


def test_who_catches_up_with_an_answer_lets_the_others_have_their_turn(model):
    "Pieces that have piled up go out one in a turn of the loop, which so hears of it when the client has left"
    service = Service(Engine(model, TOKENIZER, max_batch=1)).start()
    silence(service.engine)

    async def late():
        job, turns = service.submit([[1, 2, 3]], max_tokens=40), 0
        while service.open: await asyncio.sleep(.02)
        async def others():
            nonlocal turns
            while True: turns += 1; await asyncio.sleep(0)
        beside = asyncio.create_task(others())
        pieces = [piece async for piece in job.pieces()]
        beside.cancel()
        return len(pieces), turns
    pieces, turns = asyncio.run(late())
    service.stop()
    assert turns >= pieces - 1 > 10


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", ["before the answer begins", "when it begins"])
def test_client_that_leaves_before_the_first_word_gives_its_place_back(model, stream, leave):
    service = Service(Engine(model, TOKENIZER, max_batch=2)).start()
    app, step = make_app(service, chat_page=False), service.engine.step
    service.engine.step = lambda: (time.sleep(.05), step())[1]
    service.engine.notable[:] = False
    body = json.dumps(dict(messages=[dict(role="user", content="hello")], max_tokens=200, stream=stream)).encode()
    scope = dict(type="http", method="POST", path="/v1/chat/completions", raw_path=b"/v1/chat/completions", query_string=b"", root_path="", scheme="http", http_version="1.1", asgi=dict(version="3.0", spec_version="2.3"),
                 headers=[(b"host", b"localhost"), (b"content-type", b"application/json")], client=("127.0.0.1", 1), server=("127.0.0.1", 80))

    async def visit():
        events = [dict(type="http.request", body=body, more_body=False)]
        async def receive(): return events.pop(0) if events else dict(type="http.disconnect")
        async def send(message):
            if leave == "when it begins": raise OSError("the client has gone")
            await asyncio.sleep(5)  # the response's first bytes do not go out
        with contextlib.suppress(Exception): await asyncio.wait_for(app(scope, receive, send), 2)
        left = len(service.open)
        await asyncio.sleep(.3)
        return left, len(service.open), service.engine.busy
    try: assert asyncio.run(visit()) == (0, 0, False)
    finally: service.stop()


def test_a_page_of_another_name_is_refused(server):
    "DNS rebinding: a web page whose name points at 127.0.0.1 must not reach the server through the reader's browser"
    for path in ("/v1/models", "/health"):
        assert httpx.get(server.url + path, headers={"Host": f"evil.example:{server.port}"}).status_code == 400
        assert httpx.get(server.url + path, headers={"Host": f"localhost:{server.port}"}).status_code == 200
    assert httpx.post(server.url + "/v1/chat/completions", headers={"Host": "evil.example"}, json={}).status_code == 400


def test_many_users_at_once_get_their_own_answers(server):
    async def ask(client, seed):
        answer = await client.post(server.url + "/v1/chat/completions", json=dict(messages=[dict(role="user", content="hello")], max_tokens=8, seed=seed))
        return answer.json()["choices"][0]["message"]["content"]

    async def crowd():
        async with httpx.AsyncClient(timeout=60) as client: return await asyncio.gather(*[ask(client, i) for i in range(8)])
    assert asyncio.run(crowd()) == [server.post(max_tokens=8, seed=i).json()["choices"][0]["message"]["content"] for i in range(8)]


def test_a_request_takes_no_thread_of_its_own(model):
    with Server(model) as server:
        known = set(threading.enumerate())
        assert server.post().status_code == server.post(max_tokens=1).status_code == 200
        assert set(threading.enumerate()) == known


def test_a_long_prompt_moves_nothing_of_the_answers_at_work(model):
    "On a CPU the cache has its full size from the start: to grow it in the middle of answers holds them all up"
    with Server(model) as server:
        place = server.service.engine.cache.k.data_ptr()
        for asked in (dict(prompt="a", max_tokens=2), dict(prompt=[5] * 250, n=4, max_tokens=2)): assert complete(server, **asked).status_code == 200
        assert server.service.engine.cache.k.data_ptr() == place


def test_a_step_reads_a_piece_or_lets_rows_in(model):
    "Both together would hold up the answers at work for longer than either"
    engine, happened = Engine(model, TOKENIZER, max_batch=4), []
    engine.piece_tokens, engine.stops, engine.notable[:] = 16, set(), False
    for name in ("_prefill", "_join"): setattr(engine, name, lambda *given, name=name, real=getattr(engine, name): (happened[-1].append(name), real(*given))[1])
    [running], late = engine.submit([5] * 8, max_tokens=40), None
    for step in range(20):
        if step == 3: [late] = engine.submit(list(range(60)), max_tokens=4)
        happened.append([])
        engine.step()
    assert happened[3:8] == [["_prefill"]] * 4 + [["_join"]] and len(late.ids) == 4 and len(running.ids) == 20


def test_a_piece_is_as_long_as_patience_allows(model):
    service = Service(Engine(model, TOKENIZER))
    engine = service.engine

    def read(step, start, token, prompt=math.inf):
        "Pieces that cost so many seconds, beside steps that do"
        for _ in range(9): service.pace(step, 0)
        for _ in range(30):
            engine.reading, n = "more" if prompt > engine.piece_tokens else None, min(engine.piece_tokens, prompt)
            service.pace(step + start + token * n, n)
        return engine.piece_tokens
    assert abs(read(.010, .004, .0001) - (PATIENCE * .010 - .014) / .0001) <= 2
    assert (long := read(.020, .004, .0001)) > 150, "slower steps leave more room"
    assert read(.020, .004, .0001, prompt=8) == long, "short prompts say little about longer pieces"
    assert read(.010, .004, .0001, prompt=120) < 120, "unless they take too long"
    assert read(.002, .004, .0001) == SHORTEST_PIECE, "where nothing is short enough, not one by one"


def test_the_server_measures_its_pieces(model):
    with Server(model) as server:
        slow(server)
        with httpx.stream("POST", server.url + "/v1/completions", json=dict(prompt="a", max_tokens=60, stream=True), timeout=60) as answer:
            for _, _ in zip(range(10), lines := answer.iter_lines()): continue
            assert complete(server, prompt=[7] * 200, max_tokens=1).status_code == 200
            assert server.service.engine.piece_tokens > 2 * SHORTEST_PIECE, "beside such slow steps a longer piece goes unnoticed"
            list(lines)


def test_engine_failure_is_told_and_survived(model, capfd):
    with Server(model) as server:
        step, broken = server.service.engine.step, [True]

        def fail():
            if broken.pop() if broken else False: raise RuntimeError("out of memory")
            return step()
        server.service.engine.step = fail
        answer = server.post()
        assert answer.status_code == 500 and "out of memory" in answer.json()["error"]["message"]
        assert server.post().status_code == 200 and server.idle()


def test_tool_calls_in_history_become_tokens_again():
    from nanochat.serve import api_messages, request_model
    asked = request_model()(messages=[dict(role="user", content="2*3?"), dict(role="assistant", content="<<2*3=6>>6"), dict(role="user", content="and?")])
    ids = TOKENIZER.render_for_completion(api_messages(asked.messages))
    assert {TOKENIZER.special["<|python_start|>"], TOKENIZER.special["<|output_end|>"]} <= set(ids)
    assert show_calls("<<2*3=6>>6") == "`2*3 = 6` 6"


# what a request may ask

def say(text, **fields):
    return dict(messages=[dict(role="user", content=text)]) | fields


def complete(server, **fields):
    return httpx.post(server.url + "/v1/completions", json=fields, timeout=60)


def events(server, path, **fields):
    "The chunks of a stream"
    with httpx.stream("POST", server.url + path, json=fields | dict(stream=True), timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert answer.status_code == 200 and lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def silence(engine):
    "No token ends an answer"
    engine.notable[:], engine.stops = False, set()


@pytest.mark.parametrize("settings", [dict(top_p=.5, top_k=0), dict(min_p=.3, top_k=0), dict(repetition_penalty=3.), dict(top_k=1), dict(top_k=0, temperature=2.), dict(temperature=0)], ids=str)
def test_every_dial_reaches_the_engine_by_both_paths(server, model, settings):
    prompt, engine = TOKENIZER.render_for_completion(say("hello")["messages"]), Engine(model, TOKENIZER)
    wanted = dict(max_tokens=12, seed=5, temperature=.8) | settings
    [[sample]], [[plain]] = engine.generate([prompt], **wanted), engine.generate([prompt], **dict(max_tokens=12, seed=5, temperature=.8))
    text = readable_text(TOKENIZER, sample.ids)
    assert server.post(**wanted).json()["choices"][0]["message"]["content"] == text
    assert complete(server, prompt=prompt, **wanted).json()["choices"][0]["text"] == text
    assert text != readable_text(TOKENIZER, plain.ids), "the dial does nothing here: choose another seed"


def test_several_answers_to_several_prompts_are_those_of_the_engine(server, model):
    prompts = [TOKENIZER.encode(text, prepend="<|bos|>") for text in ("hello", "how are")]
    samples = Engine(model, TOKENIZER).generate(prompts, num_samples=3, max_tokens=9, temperature=.8, seed=7)
    expected = [readable_text(TOKENIZER, sample.ids) for group in samples for sample in group]
    assert len(set(expected)) == 6
    for given in (["hello", "how are"], prompts):
        whole = complete(server, prompt=given, n=3, max_tokens=9, seed=7).json()
        assert [c["text"] for c in whole["choices"]] == expected and [c["index"] for c in whole["choices"]] == list(range(6))
        assert whole["usage"] == dict(prompt_tokens=sum(map(len, prompts)), completion_tokens=sum(len(s.ids) for g in samples for s in g), total_tokens=sum(map(len, prompts)) + sum(len(s.ids) for g in samples for s in g))
    found = [""] * 6
    for chunk in events(server, "/v1/completions", prompt=prompts, n=3, max_tokens=9, seed=7):
        for c in chunk["choices"]: found[c["index"]] += c["text"]
    assert found == expected and server.idle()


def test_official_client_gets_what_it_asks_for(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    asked = dict(model="tiny", messages=say("hello")["messages"], max_completion_tokens=12, seed=3, n=2, top_p=.95, logprobs=True, top_logprobs=2, extra_body=dict(top_k=20, min_p=.01, repetition_penalty=1.1))
    whole = client.chat.completions.create(**asked)
    assert [c.index for c in whole.choices] == [0, 1] and whole.choices[0].message.content != whole.choices[1].message.content
    said, tokens, ends = ["", ""], [[], []], [None, None]
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options=dict(include_usage=True)):
        for c in chunk.choices:
            said[c.index] += c.delta.content or ""
            tokens[c.index] += c.logprobs.content if c.logprobs else []
            ends[c.index] = c.finish_reason or ends[c.index]
    assert chunk.usage == whole.usage and chunk.choices == []
    for c in whole.choices:
        assert (said[c.index], tokens[c.index], ends[c.index]) == (c.message.content, c.logprobs.content, c.finish_reason)
        assert b"".join(bytes(t.bytes) for t in c.logprobs.content).decode(errors="replace") == c.message.content
        assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob >= t.logprob for t in c.logprobs.content)
    with client.chat.completions.stream(model="tiny", messages=asked["messages"], max_tokens=12, seed=3) as stream:
        for _ in stream: continue
        assert stream.current_completion_snapshot.choices[0].message.role == "assistant"
    text = client.completions.create(model="tiny", prompt="hello", max_tokens=6, seed=1, logprobs=2, echo=True).choices[0]
    streamed = [chunk.choices[0] for chunk in client.completions.create(model="tiny", prompt="hello", max_tokens=6, seed=1, logprobs=2, echo=True, stream=True)]
    assert "".join(c.text for c in streamed) == text.text and text.text.startswith("hello") and streamed[-1].finish_reason == text.finish_reason
    assert [t for c in streamed if c.logprobs for t in c.logprobs.tokens] == text.logprobs.tokens
    assert [t for c in streamed if c.logprobs for t in c.logprobs.text_offset] == text.logprobs.text_offset


def test_a_stop_text_is_never_shown_and_nothing_before_it_is_lost(model):
    "By every path, for stops that end inside a token, at its end, at the limit, or never come"
    with Server(model) as server:
        silence(server.service.engine)
        for path, asked in (("/v1/chat/completions", say("hello")), ("/v1/completions", dict(prompt="hello"))):
            def ask(**more): return httpx.post(server.url + path, json=asked | dict(max_tokens=12, seed=3) | more, timeout=60).json()["choices"][0]
            def text(choice): return choice["text"] if "text" in choice else choice.get("message", choice.get("delta")).get("content", "")
            free = text(ask())
            stops = sorted({free[a:a + n] for a in range(len(free)) for n in (1, 3)}) + [free[-1] + "never", free[-2:] + "\0"]
            assert len(stops) > 12
            for stop in stops:
                expected = free[:free.find(stop)] if stop in free else free
                whole = ask(stop=stop, logprobs=True)
                chunks = [c for chunk in events(server, path, **asked, max_tokens=12, seed=3, stop=stop, logprobs=True) for c in chunk["choices"]]
                assert text(whole) == "".join(map(text, chunks)) == expected, stop
                assert whole["finish_reason"] == chunks[-1]["finish_reason"] == ("stop" if stop in free else "length")
                if path == "/v1/completions" and stop in free: # tokens of the stop text are not listed either
                    offsets = whole["logprobs"]["text_offset"] if expected else []
                    assert offsets == [at for c in chunks if c["logprobs"] for at in c["logprobs"]["text_offset"]] and all(at < len(expected) for at in offsets) and bool(offsets) == bool(expected)
        assert server.idle()


def test_the_end_of_a_text_is_whole_however_it_ends(model, monkeypatch):
    "A character or a possible stop that is held back comes out at a limit and at a stop token, once"
    import nanochat.engine as module
    bird, end = TOKENIZER.encode("🐦"), TOKENIZER.special["<|assistant_end|>"]
    for words, limit, stop, text, reason in [
            (TOKENIZER.encode("ab") + [end], 9, "bc", "ab", "stop"), (TOKENIZER.encode("ab"), len(TOKENIZER.encode("ab")), "bc", "ab", "length"), (TOKENIZER.encode("abcd"), 9, "bc", "a", "stop"),
            (bird[:-1], len(bird) - 1, (), "\ufffd", "length"), (bird[:-1] + [end], 9, (), "\ufffd", "stop"), (bird + TOKENIZER.encode("!"), 9, "!", "🐦", "stop"), ([end], 9, "x", "", "stop")]:
        said = iter(words)
        monkeypatch.setattr(module, "choose_tokens", lambda logits, *rest: module.np.array([next(said)]))
        service = Service(Engine(model, TOKENIZER, max_batch=1)).start()
        async def read(): return [piece async for piece in service.submit([[5, 6]], max_tokens=limit, stop=stop).pieces()]
        pieces = asyncio.run(read())
        service.stop()
        assert ("".join(p[1] for p in pieces), pieces[-1][0].reason) == (text, reason), words


# log-probabilities of given texts

def test_echo_with_logprobs_is_the_models_own_judgement_of_a_text(model):
    "lm_eval's way: the prompt holds context and continuation, one token is added, the entries from the context's end to the last but one count"
    with Server(model) as server:
        prompts = [TOKENIZER.encode(text, prepend="<|bos|>") for text in ("hello world, how are you?", "you are", "are hello you " * 12)] + [[7]]
        logs = [model(torch.tensor([p]))[0].log_softmax(-1) for p in prompts]
        server.service.engine.stops.add(logs[0][-1].argmax().item())  # the token that comes next ends the answer
        server.service.engine.notable[list(server.service.engine.stops)] = True
        server.service.engine.piece_tokens = 5
        for fields in (dict(prompt=prompts), *(dict(prompt=prompt) for prompt in prompts)):
            chosen = zip(prompts, logs) if fields["prompt"] is prompts else [(fields["prompt"], logs[prompts.index(fields["prompt"])])]
            answer = complete(server, **fields, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234).json()
            for choice, (prompt, log) in zip(answer["choices"], chosen):
                found = choice["logprobs"]
                assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(found["text_offset"]) == len(prompt) + 1
                assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
                exact = log[torch.arange(len(prompt) - 1), prompt[1:]]
                torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:-1]), exact, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(found["token_logprobs"][-1], log[-1].max().item(), rtol=1e-4, atol=1e-4)
                greedy = [logprob == max(top.values()) for logprob, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:])]
                assert greedy == [*(log[:-1].argmax(-1) == torch.tensor(prompt[1:])).tolist(), True]
        assert choice["finish_reason"] == "length" and server.idle()


def test_a_text_that_is_judged_is_read_from_its_beginning_and_shares_nothing(model):
    with Server(model) as server:
        prompt = TOKENIZER.encode("hello world, how are you? " * 3, prepend="<|bos|>")
        plain = complete(server, prompt=prompt, max_tokens=4, seed=1).json()["choices"][0]["text"]
        judged = complete(server, prompt=prompt, max_tokens=4, seed=1, n=2, logprobs=0, echo=True).json()["choices"]
        assert judged[0]["text"] == "hello world, how are you? " * 3 + plain
        assert all(len(c["logprobs"]["tokens"]) >= len(prompt) and None not in c["logprobs"]["token_logprobs"][1:] for c in judged)
        assert "".join(judged[0]["logprobs"]["tokens"][1:len(prompt)]) == "hello world, how are you? " * 3
        assert all(judged[0]["text"][at:].startswith(name) for name, at in list(zip(judged[0]["logprobs"]["tokens"], judged[0]["logprobs"]["text_offset"]))[1:len(prompt)])


def test_tokens_that_are_no_text_have_names_of_their_own():
    stream = TextStream(TOKENIZER)
    names = [token_name(stream, token)[0] for token in range(TOKENIZER.vocab_size)]
    assert len(set(names)) == len(names) and names[200] == "bytes:\\xc8" and names[TOKENIZER.bos] == "<|bos|>"


# bad requests

@pytest.mark.parametrize("fields, named", [
    (dict(), "prompt"), (dict(prompt=[]), "prompt"), (dict(prompt=[[]]), "prompt"), (dict(prompt=[5, -1]), "prompt"), (dict(prompt=[5, 290]), "prompt"), (dict(prompt=[1] * 256), "prompt"), (dict(prompt="x" * 32_001), "prompt.0"),
    (dict(prompt=["a"] * 9), "prompt"), (dict(prompt=[["a"]]), "prompt.0"), (dict(prompt="a", stop=""), "stop.0"), (dict(prompt="a", stop=[1]), "stop.0"), (dict(prompt="a", stop=["a"] * 17), "stop"), (dict(prompt="a", top_p=0), "top_p"),
    (dict(prompt="a", min_p=2), "min_p"), (dict(prompt="a", repetition_penalty=0), "repetition_penalty"), (dict(prompt="a", logprobs=21), "logprobs"), (dict(prompt="a", max_tokens=0), "max_tokens"), (dict(prompt="a", n=0), "n")])
def test_malformed_completion_gets_422_with_the_field_and_disturbs_nobody(server, fields, named):
    answer = complete(server, **fields)
    assert answer.status_code == 422 and answer.json()["error"]["param"] == named, answer.text
    assert complete(server, prompt="a", max_tokens=2).status_code == 200


@pytest.mark.parametrize("content", [b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "\\ud83d"}', b"[" * 50_000, b"null", b"[]", b'"a"', b"\xff\xfe", b'{"prompt": {"a": 1}}', b'{"prompt": 1e999}', b""], ids=lambda c: str(c[:20]))
def test_strange_bodies_are_refused_in_words(server, content):
    answer = httpx.post(server.url + "/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["error"]["message"]


def test_a_body_that_never_ends_is_given_up(server, monkeypatch):
    import nanochat.serve
    monkeypatch.setattr(nanochat.serve, "SLOWEST_BODY", .3)
    with socket.create_connection(("127.0.0.1", server.port)) as half_open:
        half_open.settimeout(10)
        half_open.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{\"prompt\"")
        assert b" 408 " in half_open.recv(4096).splitlines()[0]


# places

def test_clients_that_leave_free_their_places_at_once_at_work_and_in_line(model):
    with Server(model, slots=1, queue=3) as server:
        slow(server)
        client = httpx.Client(timeout=60)
        with pytest.raises(httpx.ReadTimeout): complete_once(server, .3)
        assert server.idle(.5)
        with httpx.stream("POST", server.url + "/v1/completions", json=dict(prompt="a", max_tokens=200, stream=True), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout): complete_once(server, .3, n=3)
            end = time.time() + .5
            while server.service.places() != (1, 0) and time.time() < end: time.sleep(.01)
            assert server.service.places() == (1, 0), "three answers in line are given up with their client"
        assert server.idle(1) and client.get(server.url + "/health").json()["waiting"] == 0


def complete_once(server, seconds, **fields):
    return httpx.post(server.url + "/v1/completions", json=dict(prompt="a", max_tokens=200) | fields, timeout=seconds)


def test_metrics_count_answers_tokens_and_refusals(model):
    with Server(model, slots=2, queue=0) as server:
        def numbers():
            page = httpx.get(server.url + "/metrics")
            assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert all(line.startswith(("# HELP nanochat_", "# TYPE nanochat_", "nanochat_")) for line in page.text.splitlines())
            return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))}
        silence(server.service.engine)
        usage = complete(server, prompt="hello", n=2, max_tokens=5).json()["usage"]
        found = numbers()
        assert found['nanochat_answers_ended_total{end="stop"}'] == 0 and found['nanochat_answers_ended_total{end="length"}'] == found["nanochat_first_token_seconds_count"] == 2 and found["nanochat_first_token_seconds_sum"] > 0
        assert found["nanochat_written_tokens_total"] == usage["completion_tokens"] == 10
        assert found['nanochat_prompt_tokens_total{how="read"}'] == found['nanochat_prompt_tokens_total{how="shared"}'] == usage["prompt_tokens"] - 1
        slow(server)
        with httpx.stream("POST", server.url + "/v1/completions", json=dict(prompt="a", n=2, max_tokens=200, stream=True), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert numbers()['nanochat_answers{state="at_work"}'] == 2
            assert complete(server, prompt="a").status_code == 503
        assert server.idle(2)
        found = numbers()
        assert found['nanochat_answers_ended_total{end="left"}'] == 2 and found["nanochat_requests_refused_total"] == 1 and found['nanochat_answers{state="at_work"}'] == 0


def test_shutdown_ends_open_streams_and_the_engines_thread(model):
    with Server(model) as server:
        slow(server)
        with httpx.stream("POST", server.url + "/v1/completions", json=dict(prompt="a", max_tokens=240, stream=True), timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            start, server.server.should_exit = time.time(), True
            with contextlib.suppress(httpx.RemoteProtocolError): list(lines)
        server.thread.join(10)
        assert time.time() - start < 5 and not server.thread.is_alive() and not server.service.thread.is_alive() and not server.service.open


def test_good_clients_are_undisturbed_by_bad_ones(model):
    "Seeded answers are those of the same requests alone, whatever the others do, and no place is left taken"
    with Server(model, slots=4, queue=40) as server:
        def good(i): return dict(prompt="hello " * (1 + i % 5), n=1 + i % 2, max_tokens=20, seed=i, top_p=.9, logprobs=1)
        alone = [complete(server, **good(i)).json()["choices"] for i in range(6)]
        end, asked, wrong = time.time() + 6, [], []

        def well_behaved(i):
            while time.time() < end:
                answer = complete(server, **good(i))
                asked.append(i)
                if answer.status_code != 200 or [(c["text"], c["finish_reason"]) for c in answer.json()["choices"]] != [(c["text"], c["finish_reason"]) for c in alone[i]]: wrong.append(answer.text)

        def half_open():
            with socket.create_connection(("127.0.0.1", server.port)) as half: half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"); time.sleep(.1)

        def hang_up():
            with httpx.stream("POST", server.url + "/v1/completions", json=dict(prompt="a", n=3, max_tokens=200, stream=True), timeout=5) as answer: next(answer.iter_lines())

        tricks = [half_open, hang_up, lambda: complete_once(server, .05), lambda: httpx.post(server.url + "/v1/completions", content=b"{"), lambda: httpx.post(server.url + "/v1/completions", content=b"x" * (LARGEST_BODY + 1)),
                  lambda: complete(server, prompt=[99999]), lambda: complete(server, prompt="a", temperature=-1), lambda: httpx.get(server.url + "/nowhere")]

        def misbehaved(i):
            while time.time() < end:
                with contextlib.suppress(httpx.TransportError, OSError): tricks[i % len(tricks)]()
                i += 3
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6) for work in (well_behaved, misbehaved)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(60)
        assert not wrong and set(asked) == set(range(6)) and server.idle()
        assert server.service.places() == (0, 0) and not server.service.choices and not server.service.engine.rows[len(server.service.engine.holes):]


# the command line

def command(module, *words, typed="", **options):
    return subprocess.run([sys.executable, "-m", f"nanochat.{module}", "--device", "cpu", *words], input=typed, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def test_chat_command_answers_arguments_and_pipes(home):
    once = command("chat", "-p", "hello", "--seed", "1", "--max-tokens", "8")
    piped = command("chat", "--seed", "1", "--max-tokens", "8", typed="hello\n")
    assert once.returncode == piped.returncode == 0 and once.stdout == piped.stdout and once.stdout.strip()
    small = command("chat", "-p", "hello", "--seed", "1", "--max-tokens", "8", "--int8")
    assert small.returncode == 0 and small.stdout.strip(), small.stderr


@pytest.mark.parametrize("module, words, said", [
    ("chat", ("--run", "nobody", "-p", "x"), "no such run"), ("chat", ("--stage", "rl", "-p", "x"), "no whole checkpoint"), ("chat", ("-p", "x", "--temperature", "-1"), "--temperature"),
    ("chat", ("-p", "word " * 300), "room for"), ("serve", ("--run", "nobody", "--port", "0"), "no such run"), ("serve", ("--port", "70000"), "cannot listen")])
def test_command_errors_are_one_line_and_status_2(home, module, words, said):
    done = command(module, *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("nanochat: error: ")


def test_chat_conversation_on_a_terminal_survives_ctrl_c(home):
    import pty, select
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run started in the background ignores it
        os.execv(sys.executable, [sys.executable, "-m", "nanochat.chat", "--device", "cpu", "--max-tokens", "6", "--seed", "1"])
    heard = b""

    def until(text, seconds=60):
        nonlocal heard
        end = time.time() + seconds
        while text not in heard and time.time() < end:
            if select.select([terminal], [], [], .2)[0]:
                try: heard += os.read(terminal, 65536)
                except OSError: break
        assert text in heard, heard
        before, _, heard = heard.partition(text)
        return before
    try:
        until(b"you: "); os.write(terminal, b"hello\n")
        until(b"nanochat: "); until(b"you: ")
        time.sleep(.5)  # input() does not see a signal that comes while it is still setting up
        os.kill(pid, signal.SIGINT)
        until(b"Ctrl-D to leave"); until(b"you: ")
        os.write(terminal, b"/temperature 0\n"); until(b"temperature is 0"); until(b"you: ")
        os.write(terminal, b"/exit\n")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (home / "chat_history").read_text().splitlines()[-3:] == ["hello", "/temperature 0", "/exit"]
    finally: os.close(terminal)


def test_interrupted_answer_stays_in_the_conversation(model):
    chat = Chat(Engine(model, TOKENIZER), temperature=0, max_tokens=30)
    pieces = chat.reply("hello")
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert not chat.engine.busy and [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert "".join(p["text"] for p in chat.messages[1]["content"]) == heard
    for _ in range(12): list(chat.reply("and now?"))
    assert chat.left_out > 0
    with pytest.raises(NanochatError): list(chat.reply("long " * 400))
    assert run_command(chat, "/clear") and not chat.messages


@pytest.fixture
def ctrl_c():
    "Ctrl-C interrupts, also where tests run side by side: there the runner lets it pass"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_answer_and_nothing_else(model, capsys, ctrl_c):
    from nanochat.chat import say
    expected = Chat(Engine(model, TOKENIZER), temperature=0, max_tokens=12)
    whole = "".join(expected.reply("hello"))
    chat, steps = Chat(Engine(model, TOKENIZER), temperature=0, max_tokens=12), []
    step = chat.engine.step
    chat.engine.step = lambda: (steps.append(1), signal.raise_signal(signal.SIGINT) if len(steps) == 6 else None, step())[2]
    say(chat, "hello")
    heard = "".join(part["text"] for part in chat.messages[1]["content"])
    assert not chat.engine.busy and whole.startswith(heard) and 0 < len(heard) < len(whole) and capsys.readouterr().out.endswith(" …\n")
    say(chat, "and now?")
    assert len(chat.messages) == 4 and chat.messages[3]["content"] and not chat.engine.busy


def test_a_model_cannot_command_the_terminal(capsys):
    from nanochat.chat import say
    written = "a\x1b]0;title\x07b\x1b[2Jc\r\x08\x7f\x9b31md\n\té 🙂"

    class Parrot:
        def reply(self, text): yield from written
    say(Parrot(), "hello")
    assert capsys.readouterr().out == "a]0;titleb[2Jc31md\n\té 🙂\n"


def test_best_stage_prefers_the_latest(home):
    run = Run.open("random")
    assert best_stage(run) == "sft"
    with pytest.raises(NanochatError, match="no stage"): best_stage(Run.create("empty"))


def test_serve_command_serves_and_ends_on_ctrl_c(home):
    process = subprocess.Popen([sys.executable, "-m", "nanochat.serve", "--device", "cpu", "--port", "0", "--run", "random"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        said = process.stdout.readline()
        url = said.split()[1].removesuffix("/chat")
        for _ in range(200):
            try: page = httpx.get(url + "/chat", timeout=30); break
            except httpx.ConnectError: time.sleep(.1)
        assert page.status_code == 200 and "nanochat" in page.text
        assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "random-sft"
        assert url.startswith("http://127.0.0.1:")
        second = command("serve", "--port", url.rpartition(":")[2])
        assert second.returncode == 2 and "in use" in second.stderr
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, -signal.SIGINT), process.stderr.read()


@pytest.mark.parametrize("words, warned", [(("--host", "0.0.0.0"), True), (("--host", "0.0.0.0", "--api-key", "sesame"), False), (("--host", "localhost"), False)])
def test_serve_command_warns_when_everybody_may_ask(home, words, warned):
    environment = {k: v for k, v in os.environ.items() if k != "NANOCHAT_API_KEY"}
    process = subprocess.Popen([sys.executable, "-m", "nanochat.serve", "--device", "cpu", "--port", "0", "--run", "random", "--no-chat-page", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        said = process.stdout.readline()
        port = said.split("/v1")[0].rpartition(":")[2]
        for _ in range(200):
            try: answer = httpx.get(f"http://127.0.0.1:{port}/health", headers={"Host": f"laptop.example:{port}"}); break
            except httpx.ConnectError: time.sleep(.1)
        assert answer.status_code == (400 if words[1] == "localhost" else 200), "only a server for other machines goes by other names"
    finally: process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    assert ("--api-key" in errors) == warned and len(errors.splitlines()) == warned, errors


# the page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    "A page in a headless browser, driven through its debugging port"
    def __init__(self, url, folder):
        from websockets.sync.client import connect
        self.process = subprocess.Popen([BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0", "--window-size=1000,800", f"--user-data-dir={folder}",
                                         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # no name resolves: the page must need no network
        port_file, end = Path(folder, "DevToolsActivePort"), time.time() + 60
        while not port_file.exists() and time.time() < end: time.sleep(.1)
        time.sleep(.3)
        port = port_file.read_text().split()[0]
        target = next(t for t in httpx.get(f"http://127.0.0.1:{port}/json").json() if t["type"] == "page")
        self.stack, self.count = contextlib.ExitStack(), 0
        self.socket = self.stack.enter_context(connect(target["webSocketDebuggerUrl"], max_size=2**26))

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while (answer := json.loads(self.socket.recv(60))).get("id") != self.count: continue
        return answer["result"]

    DEEP = "const all = r => [...r.querySelectorAll('*')].flatMap(e => e.shadowRoot ? [e, ...all(e.shadowRoot)] : [e]);"

    def js(self, code): return self.call("Runtime.evaluate", expression=f"(() => {{ {self.DEEP} {code} }})()", returnByValue=True)["result"].get("value")

    def until(self, code, seconds=60):
        end = time.time() + seconds
        while not (value := self.js(code)) and time.time() < end: time.sleep(.2)
        assert value, f"never came true: {code}"
        return value

    def close(self):
        self.stack.close()
        self.process.terminate()
        self.process.wait(20)


def test_html_that_a_model_writes_is_shown_and_not_obeyed(model):
    pytest.importorskip("panel")
    import html
    from nanochat.serve import chat_widget
    chat = chat_widget(Service(Engine(model, TOKENIZER)))[1]
    bad = ["<script>alert(1)</script>", "see <img src=x onerror=alert(1)>", "<<1<script>=2>>", "[a](javascript:alert(1))", "https://evil.example/a.png", str(ROOT / "README.md"), "**bold**, `a < b` & so on"]
    for text in bad: chat.send(show_calls(text), user="nanochat", respond=False)
    shown = [html.unescape(message._object_panel.get_root().text) for message in chat.objects]
    for page in shown: assert not any(word in page for word in ("<script", "<img", 'href="javascript')), page
    assert "<strong>bold</strong>, <code>a &lt; b</code> &amp; so on" in shown[-1] and "README" in shown[-2] and len(shown[-2]) < 300
    assert [message["content"] for message in chat.serialize()] == [show_calls(text) for text in bad], "the next prompt holds what was written"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_chat_page_answers_in_a_browser_without_a_network(model, tmp_path):
    import base64
    with Server(model, chat_page=True) as server:
        page = Page(server.url + "/chat", tmp_path)
        try:
            page.until("const t = all(document).find(e => e.tagName == 'TEXTAREA'); if (t) t.focus(); return !!t")
            prompts, submit = [], server.service.submit
            server.service.submit = lambda asked, **settings: (prompts.extend(asked), submit(asked, **settings | dict(max_tokens=12)))[1]
            names = "all(document).filter(e => e.classList.contains('name')).map(e => (e.shadowRoot || e).textContent.trim())"
            for turn, text in enumerate(("hello there", "and again"), 1):
                page.until("const t = all(document).find(e => e.tagName == 'TEXTAREA' && !e.disabled); if (t) t.focus(); return !!t")
                page.call("Input.insertText", text=text)
                page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
                page.call("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13)
                page.until(f"const n = {names}; return n.filter(x => x.endsWith('You')).length == {turn} && n.filter(x => x.endsWith('nanochat')).length == {turn}")
                assert server.idle(20)
                time.sleep(1)
            said = TOKENIZER.decode(prompts[1])
            assert len(prompts) == 2 and said.count("<|user_start|>") == 2 and said.count("<|assistant_end|>") == 1 and "makes things up" not in said, said
            picture = Path(os.environ.get("NANOCHAT_SCREENSHOT", tmp_path / "chat.png"))
            picture.write_bytes(base64.b64decode(page.call("Page.captureScreenshot")["data"]))
            assert picture.stat().st_size > 10_000
        finally: page.close()
