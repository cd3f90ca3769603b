"""The server under load: 16 streams against one, and what a long prompt does to a stream that is being written.

python benchmarks/serving.py [--depth 4] [--streams 16] [--new 200] [--prompt 1500] [--vocab-size 8192] [--rounds 3] [--threads 2] [--record FILE.json]

The server runs in a process of its own, as it would; the clients here read its streams over HTTP. Throughput is all tokens of a round divided by its time.
The time between tokens is that of one stream, while a prompt of `--prompt` tokens arrives. Weights are random and no token ends an answer. Before all this,
every slot has held such a prompt once: memory is slow where it is used for the first time.
"""
import argparse, asyncio, contextlib, gc, importlib.metadata, json, multiprocessing, os, statistics, time
from collections import Counter


def serve(ready, depth: int, vocab_size: int, threads: int, slots: int = 32, queue: int = 64, length: int = 2048, log: str = None, ascii: bool = False) -> None: # log: file for its complaints
    "A server with a random model on a free port; with `ascii` every token is a character, and none waits for its other half"
    if log: os.dup2(os.open(log, os.O_WRONLY), 2)
    import torch, uvicorn
    from inference import random_model
    from nanochat.engine import Engine
    from nanochat.serve import Service, make_app, open_port
    from nanochat.tokenizer import Tokenizer
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.train(["hello world, how are you? " * 40], 290)
    if ascii: Tokenizer.vocab_size = 128 # only its first tokens, the single bytes, and of these ASCII's
    engine = Engine(random_model(depth, vocab_size, length).requires_grad_(False), tokenizer, max_batch=slots)
    engine.notable[:], engine.stops = False, set()  # noise should not end it
    listening = open_port("127.0.0.1", 0)
    ready.send(listening.getsockname()[1])
    app = make_app(Service(engine, queue_limit=queue), chat_page=False)

    @app.get("/objects")
    async def objects(): # of this project's classes, and tasks of the event loop: those that outlive their request are a leak
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects() if str(type(thing).__module__).startswith("nanochat")) | Counter(tasks=len(asyncio.all_tasks()))
    uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=3)).run(sockets=[listening])


@contextlib.contextmanager
def server(**options):
    "Such a server in a process of its own: its port and its process"
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), kwargs=options, daemon=True)
    process.start()
    theirs.close()  # so that a server that fails ends the waiting, too
    try: yield mine.recv(), process
    finally:
        process.terminate()
        process.join(10)


async def stream(client, prompt: list[int], new: int, seed: int, **settings) -> list[float]:
    "When each piece of an answer arrives"
    wanted, times = dict(prompt=prompt, max_tokens=new, seed=seed, top_k=50, stream=True) | settings, []
    async with client.stream("POST", "/v1/completions", json=wanted, timeout=300) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"): times.append(time.perf_counter())
    return times


async def throughput(client, streams: int, new: int) -> float:
    "Tokens a second of so many streams at once"
    start = time.perf_counter()
    await asyncio.gather(*[stream(client, [1 + i] * 8, new, i) for i in range(streams)])
    return streams * new / (time.perf_counter() - start)


async def interruption(client, new: int, length: int, seed: int) -> tuple[float, float]:
    "Median and longest time between the tokens of a stream while a long prompt is read and begins to be answered, in ms"
    async def late():
        await asyncio.sleep(.3)
        start = time.perf_counter()
        await stream(client, [(seed * 7 + i * 31) % 120 for i in range(length)], 8, 0)  # never the same beginning twice
        return start, time.perf_counter()
    times, (start, end) = await asyncio.gather(stream(client, [5] * 8, new, seed), late())
    assert end < times[-1], "the stream ended before the long prompt was read; ask for more --new tokens"
    gaps = [(b - a) * 1e3 for a, b in zip(times, times[1:])]
    return statistics.median(gaps), max(gap for gap, at in zip(gaps, times[1:]) if start <= at <= end + .1)


async def measure(args, port: int) -> dict:
    "Medians of some rounds, in turns"
    import httpx
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=httpx.Limits(max_connections=None)) as client:
        await stream(client, [7] * args.prompt, 8, 0, n=args.streams)  # warm up
        one, many, gaps = [], [], []
        for i in range(args.rounds):
            one.append(await throughput(client, 1, args.new))
            many.append(await throughput(client, args.streams, args.new))
            gaps.append(await interruption(client, 4 * args.new, args.prompt, i + 1))
    middle = statistics.median
    found = dict(one=middle(one), many=middle(many), ratio=middle(b / a for a, b in zip(one, many)),
                 gap_ms=middle(gap for gap, _ in gaps), longest_gap_ms=middle(longest for _, longest in gaps), gap_ratio=middle(longest / gap for gap, longest in gaps))
    return {key: round(value, 2) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in dict(depth=4, streams=16, new=200, prompt=1500, vocab_size=8192, rounds=3, threads=os.cpu_count()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--record", help="write the figures to this JSON file")
    args = parser.parse_args()
    with server(depth=args.depth, vocab_size=args.vocab_size, threads=args.threads, ascii=True) as (port, _): found = asyncio.run(measure(args, port))
    print(f"depth {args.depth}: one stream {found['one']:,.0f} tokens/s, {args.streams} streams {found['many']:,.0f} together: {found['ratio']:.1f} times as many")
    print(f"a prompt of {args.prompt} tokens arrives: {found['gap_ms']:.1f} ms between the tokens of a running stream, at most {found['longest_gap_ms']:.1f} meanwhile: {found['gap_ratio']:.1f} times")
    if args.record:
        settings = {name: value for name, value in vars(args).items() if name != "record"} | dict(torch=importlib.metadata.version("torch"))
        open(args.record, "w").write(json.dumps(dict(settings=settings, results=found), indent=1) + "\n")


if __name__ == "__main__": main()
