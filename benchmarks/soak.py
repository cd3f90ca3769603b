"""The server for some minutes among clients that come, go and misbehave, while a few good ones stream seeded answers.

python benchmarks/soak.py [--minutes 10] [--good 4] [--bad 8] [--depth 2] [--slots 8] [--queue 16] [--threads 1] [--seed 0] [--record FILE.json]

First each good request is asked alone of the fresh server, twice, as a reference. At the end: every good stream has said the same as alone, every bad request got
the answer that it should, the server wrote nothing to its error log, slots, line, objects, connections and threads are as they were, and a line through its memory is flat.
"""
import argparse, asyncio, contextlib, json, os, random, socket, statistics, struct, tempfile, time
from collections import Counter, defaultdict

import httpx, psutil
from serving import server

LENGTH, LONG = 1024, 600 # tokens that the model has room for; characters, here also tokens, of a long prompt
TEXTS = ["hello world", "how are you? " * 8, "å∂ß 🙂 " * 3, "".join(chr(97 + i * i % 26) for i in range(LONG))]
DIALS = [dict(temperature=0), dict(top_k=20), dict(top_k=0, top_p=.9), dict(min_p=.05, repetition_penalty=1.3), dict(n=2, logprobs=2), dict(stop=["e", "h"])]
GOOD = [dict(prompt=text, max_tokens=24 + 8 * i, seed=i) | dial for i, text in enumerate(TEXTS) for dial in DIALS]


# the good clients

class Full(Exception): "The line is full: ask again later"


async def answer(client, wanted: dict) -> list[tuple[str, str]]:
    "Text of each streamed answer, and why it ended"
    texts, reasons, last = defaultdict(str), {}, None
    async with client.stream("POST", "/v1/completions", json=wanted | dict(stream=True)) as stream:
        if stream.status_code == 503: raise Full
        if stream.status_code != 200: raise ValueError(f"status {stream.status_code}: {await stream.aread()}")
        async for line in stream.aiter_lines():
            if not line: continue
            last = line.removeprefix("data: ")
            for choice in json.loads(last)["choices"] if last != "[DONE]" else []:
                texts[choice["index"]] += choice["text"]
                if choice["finish_reason"]: reasons[choice["index"]] = choice["finish_reason"]
    if last != "[DONE]": raise ValueError(f"the stream ended with {last!r}")
    return [(texts[i], reasons[i]) for i in range(wanted.get("n", 1))]


async def good_client(number: int, client, expected: list, until: float, seen: dict) -> None:
    "Ask one known request after the other"
    turn = number * 5
    while time.monotonic() < until:
        i, turn = turn % len(GOOD), turn + 1
        try:
            said = await answer(client, GOOD[i])
            seen["good"]["same as alone" if said == expected[i] else "different"] += 1
            if said != expected[i]: seen["faults"].append(f"request {i}: {said} instead of {expected[i]}")
        except Full:
            seen["good"]["asked again later"] += 1
            turn -= 1
            await asyncio.sleep(.1)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            seen["good"]["broken"] += 1
            seen["faults"].append(f"request {i}: {error!r}")


# the bad ones: each returns the status that it got; 0: the connection was closed

async def say(client, **fields) -> int: return (await client.post("/v1/completions", json=fields)).status_code


async def bad_json(client, port, chance): return (await client.post("/v1/chat/completions", content=chance.choice([b"{", b"\xff\xfe", b"[" * 5000, b"null", b""]), headers={"content-type": "application/json"})).status_code


async def wrong_types(client, port, chance):
    wrong = [dict(prompt={}), dict(prompt=[[1, "a"]]), dict(prompt=[]), dict(prompt="a", temperature="warm"), dict(prompt="a", n=[1]), dict(prompt="a", stop=[1]), dict(prompt="a", seed=1.5), dict(prompt="a", stream="often"),
             dict(prompt=[10**6]), dict(prompt=[-1]), dict(prompt="a", max_tokens=10**9), dict(prompt="a", logprobs=99)]
    return await say(client, **chance.choice(wrong))


async def too_long(client, port, chance): return await say(client, prompt=[1] * chance.choice([LENGTH, 20 * LENGTH]), stream=True)


async def too_many(client, port, chance): return await say(client, prompt=["a"] * 1000, n=16)


async def huge_body(client, port, chance):
    async def pieces():
        for _ in range(30): yield b"x" * 100_000
    try: return (await client.post("/v1/completions", content=b"x" * 3_000_000 if chance.random() < .5 else pieces())).status_code
    except httpx.TransportError: return 0


async def nowhere(client, port, chance): return (await client.request(chance.choice(["GET", "PUT", "DELETE"]), chance.choice(["/nowhere", "/v1/completions", "/%00", "//"]))).status_code


async def leave_stream(client, port, chance):
    async with client.stream("POST", "/v1/completions", json=dict(prompt="a" * chance.choice([1, LONG]), n=chance.choice([1, 3]), max_tokens=300, stream=True)) as stream:
        lines = stream.aiter_lines()
        with contextlib.suppress(StopAsyncIteration):
            for _ in range(chance.randrange(20)): await anext(lines)
        return stream.status_code


async def leave_early(client, port, chance):
    try: return (await client.post("/v1/completions", json=dict(prompt="a" * LONG, max_tokens=300), timeout=chance.random() / 2)).status_code
    except httpx.TransportError: return 0


async def crowd(client, port, chance):
    statuses = set(await asyncio.gather(*[say(client, prompt="hello", max_tokens=8, n=2) for _ in range(40)]))
    return 503 if statuses == {200, 503} else max(statuses - {200}) # the line is shorter than the crowd


@contextlib.asynccontextmanager
async def raw(port: int, sent: bytes, buffer: int = 65536):
    "A connection that is cut off at the end"
    loop, connection = asyncio.get_running_loop(), socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)) # closing says nothing nice
    connection.setblocking(False)
    try:
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, sent)
        yield lambda n: asyncio.wait_for(loop.sock_recv(connection, n), 60)
    finally: connection.close()


async def half_open(client, port, chance):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"
    async with raw(port, chance.choice([b"", head, head + b"\r\n{", head + b"\r\n" + b'{"prompt": "a"'])): await asyncio.sleep(chance.choice([.1, 3, 40]))
    return 0


async def garbage(client, port, chance):
    async with raw(port, chance.randbytes(2000) + b"\r\n\r\n") as read: return int((await read(200) or b"HTTP/1.1 0")[9:12])


async def slow_reader(client, port, chance):
    body = json.dumps(dict(prompt="hello", n=2, max_tokens=200, logprobs=20, stream=True)).encode()
    async with raw(port, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body, 2048) as read:
        status = int((await read(100))[9:12])
        for _ in range(chance.choice([5, 100])):
            await asyncio.sleep(.2)
            if not await read(500): break
        return status


TRICKS = {bad_json: {400, 422}, wrong_types: {422}, too_long: {422}, too_many: {422}, huge_body: {413, 0}, nowhere: {307, 404, 405}, leave_stream: {200, 503}, leave_early: {200, 503, 0}, crowd: {503}, half_open: {0}, garbage: {400, 0}, slow_reader: {200, 503}}


async def bad_client(client, port: int, until: float, chance: random.Random, seen: dict) -> None:
    "One trick after the other"
    while time.monotonic() < until:
        trick = chance.choice(list(TRICKS))
        try: status = await trick(client, port, chance)
        except (httpx.HTTPError, OSError, TimeoutError, ValueError) as error: status = repr(error)
        seen["bad"][trick.__name__][str(status)] += 1
        if status not in TRICKS[trick]: seen["faults"].append(f"{trick.__name__}: {status}")


# what is watched

def line(seconds: list[float], values: list[float]) -> tuple[float, float]: # the line's rise from the first to the last, scatter of the values around it
    "A line through the values"
    slope, offset = statistics.linear_regression(seconds, values)
    return slope * (seconds[-1] - seconds[0]), statistics.pstdev(value - offset - slope * at for at, value in zip(seconds, values))


async def watch(process, until: float) -> list[float]: # MB
    "The server's memory, once a second"
    found = []
    while time.monotonic() < until:
        found.append(process.memory_info().rss / 1e6)
        await asyncio.sleep(1)
    return found


async def state(client, process) -> dict:
    "What must be as it was, when all have left"
    await say(client, prompt="hello", max_tokens=2) # the last row's place is tidied when the next one comes
    health, objects = [(await client.get(path)).json() for path in ("/health", "/objects")]
    return {key: health[key] for key in ("status", "slots", "at_work", "waiting")} | {key: objects.get(key, 0) for key in ("Job", "Choice", "Row", "TextStream", "tasks")} | dict(connections=len(process.net_connections()), open_files=process.num_fds(), threads=process.num_threads())


async def warm_up(client, slots: int) -> None:
    "Have everything full and of every size once: memory is taken where it is first used, and the library of matrix products keeps a program for each size"
    chance = random.Random(0)
    async def read(prompts: int, length: int, samples: int = 1): # prompts that begin alike would not all be read
        assert await say(client, prompt=[[chance.randrange(256) for _ in range(length + 1)] for _ in range(prompts)], n=samples, max_tokens=8) == 200
    for n in range(1, slots + 1): await read(1, 1, n)
    for size in sorted(i << k for i in (4, 5, 6, 7) for k in range(10)): # tokens
        n = -(-size // (LENGTH - 8))
        await read(n, size // n)
    for length in (LENGTH - 8, LONG, 60): await asyncio.gather(*[read(1, length, 2) for _ in range(slots)])


async def soak(args, port: int, process) -> dict:
    "Let them all in, and look what is left"
    seen = dict(good=Counter(), bad=defaultdict(Counter), faults=[])
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)) as client:
        expected = [await answer(client, wanted) for wanted in GOOD]
        assert expected == [await answer(client, wanted) for wanted in GOOD], "a fresh server says different things"
        await warm_up(client, args.slots)
        await asyncio.sleep(2) # the last connection closes
        before, until = await state(client, process), time.monotonic() + 60 * args.minutes
        good = [good_client(i, client, expected, until, seen) for i in range(args.good)]
        bad = [bad_client(client, port, until, random.Random(f"{args.seed} {i}"), seen) for i in range(args.bad)]
        memory, *_ = await asyncio.gather(watch(process, until), *good, *bad)
        for _ in range(60):
            if (after := await state(client, process)) == before: break
            await asyncio.sleep(1)
    skipped = min(60, len(memory) // 2)
    rise, scatter = line(list(range(skipped, len(memory))), memory[skipped:])
    if before != after: seen["faults"].append(f"before {before}, after {after}")
    if rise > max(2 * scatter, .01 * memory[skipped]): seen["faults"].append(f"the memory grew by {rise:.1f} MB")
    return dict(good=seen["good"], bad=seen["bad"], before=before, after=after, memory_mb=[round(value, 1) for value in memory[::10]], rise_mb=round(rise, 2), scatter_mb=round(scatter, 2), faults=seen["faults"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    for name, value in dict(good=4, bad=8, depth=2, vocab_size=512, slots=8, queue=16, threads=1, seed=0).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--record", help="write what happened to this JSON file")
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("r") as log:
        with server(**{name: getattr(args, name) for name in ("depth", "vocab_size", "threads", "slots", "queue")}, length=LENGTH, log=log.name) as (port, process):
            found = asyncio.run(soak(args, port, psutil.Process(process.pid)))
        if process.exitcode is None: found["faults"].append("it did not end when it was told to")
        if said := log.read(): found["faults"].append(f"the server's log: {said[-3000:]}")
    good, bad = found["good"], {name: dict(statuses) for name, statuses in found["bad"].items()}
    print(f"{args.minutes:g} minutes: {good['same as alone']} good streams said the same as alone, {good['different']} something else, {good['broken']} broke; {good['asked again later']} found the line full and asked again")
    for name, statuses in sorted(bad.items()): print(f"  {name:<13} {sum(statuses.values()):6} times: " + ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items())))
    print(f"before: {found['before']}\nafter:  {found['after']}\nmemory: {found['memory_mb'][0]:.0f} MB at first, {found['memory_mb'][-1]:.0f} at last; after the first minute a line through it rises by {found['rise_mb']} MB, with {found['scatter_mb']} MB of scatter around it")
    for fault in found["faults"][:20]: print("FAULT", fault)
    if args.record: open(args.record, "w").write(json.dumps(dict(settings={name: value for name, value in vars(args).items() if name != "record"}, results=found), indent=1) + "\n")
    if found["faults"]: raise SystemExit(1)


if __name__ == "__main__": main()
