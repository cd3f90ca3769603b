"""Prefill and decoding speed against transformers' NanoChatForCausalLM.generate: the same exported weights, the same prompts, in turns, greedy, float32.

python benchmarks/inference.py [--depths 4 8] [--batches 1 8 32] [--prompt 512] [--new 64] [--vocab-size 8192] [--rounds 3] [--threads 2] [--record FILE.json]

Prefill is the time to the first new token of every row; decoding is the median time of the `--new` steps after it. The peer runs with its dynamic and
its static cache; each ratio is to the better of the two. Weights are random, so what is written is noise, but both should write the same noise: the
share of rows in which they do is printed (a rounding difference between two nearly equal scores can part them).
The floor is what no decoding step in float32 can go below on the machine: the time in which it reads the weights and every row's keys and values once.
"""
import argparse, json, os, statistics, tempfile, time
from pathlib import Path


def random_model(depth: int, vocab_size: int, length: int):
    import torch
    from nanochat.gpt import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(depth, vocab_size=vocab_size, sequence_len=length))
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=.05)  # a new model's zeros would say the same token for ever
    return model


def ours(folder: str, vocab_size: int):
    "A function that continues prompts, from the exported folder"
    from nanochat import hf
    from nanochat.engine import Engine
    model, tokenizer = hf.load(folder)
    tokenizer = type("Wide", (), dict(special=tokenizer.special, vocab_size=vocab_size))()  # the model's table is larger than this tokenizer
    model.requires_grad_(False)
    engines = {}  # one for each number of prompts: it packs its weights once, as the peer loads its own once
    def generate(prompts, new, tick):
        if len(prompts) not in engines: engines[len(prompts)] = Engine(model, tokenizer, max_batch=len(prompts), memory_tokens=0)  # else it would remember the last round's prompts
        engine = engines[len(prompts)]
        engine.notable[:], engine.stops = False, set()  # noise should not end it
        rows = [engine.submit(prompt, 1, new, temperature=0)[0] for prompt in prompts]
        while engine.busy:
            engine.step()
            tick()
        return [row.ids for row in rows]
    return generate


def peer(folder: str, static: bool):
    "The same with transformers"
    import torch
    from transformers import NanoChatForCausalLM
    model = NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    cache = dict(cache_implementation="static") if static else {}
    class Ticks:  # generate() hands every step's tokens to a streamer, the prompt first
        def __init__(self, tick): self.tick, self.begun = tick, False
        def put(self, _): self.begun, _ = True, self.begun and self.tick()
        def end(self): pass
    def generate(prompts, new, tick):
        ids = torch.tensor(prompts)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=Ticks(tick), **cache)[:, ids.size(1):].tolist()
    return generate


def measure(generate, prompts: list, new: int) -> tuple[dict, list]:
    "Tokens a second in both phases, and what was written"
    times = [time.perf_counter()]
    written = generate(prompts, 1 + new, lambda: times.append(time.perf_counter()))
    first, *steps = (b - a for a, b in zip(times, times[1:]))
    assert len(steps) == new, f"{len(steps)} steps instead of {new}"
    step = statistics.median(steps)
    return dict(prefill=len(prompts) * len(prompts[0]) / first, decode=len(prompts) / step, step_ms=1e3 * step), written


def floor_ms(config, batch: int, tokens: int) -> float:
    "The time to read as many bytes as a step must: the matrices, and the keys and values of so many tokens in each row"
    import torch
    matrices = 12 * config.n_layer * config.n_embd ** 2 + config.vocab_size * config.n_embd
    memory = torch.ones(matrices + batch * tokens * 2 * config.n_layer * config.n_kv_head * config.n_embd // config.n_head)
    def read():
        start = time.perf_counter()
        memory.sum()
        return time.perf_counter() - start
    return 1e3 * min(read() for _ in range(10))


def compare(args, depth: int) -> list[dict]:
    "Medians for every batch size of one depth"
    import torch
    from nanochat import hf
    from nanochat.tokenizer import Tokenizer
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        model = random_model(depth, args.vocab_size, args.prompt + args.new + 1)
        folder = hf.save(model, Tokenizer.train(["any"], 265), Path(scratch) / "export")
        runners, rows = {"nanochat": ours(folder, args.vocab_size), "transformers dynamic": peer(folder, False), "transformers static": peer(folder, True)}, []
        for batch in args.batches:
            prompts = torch.randint(args.vocab_size, (batch, args.prompt), generator=torch.Generator().manual_seed(batch)).tolist()
            results, written = {name: [] for name in runners}, {}
            for name, generate in runners.items(): measure(generate, prompts, 1)  # warm up
            for _ in range(args.rounds):
                for name, generate in runners.items():
                    found, written[name] = measure(generate, prompts, args.new)
                    results[name].append(found)
            medians = {name: {key: round(statistics.median(r[key] for r in found), 2) for key in found[0]} for name, found in results.items()}
            ratios = {key: round(medians["nanochat"][key] / max(m[key] for name, m in medians.items() if name != "nanochat"), 2) for key in ("prefill", "decode")}
            same = statistics.mean(a == b for a, b in zip(written["nanochat"], written["transformers dynamic"]))
            floor = round(floor_ms(model.config, batch, args.prompt + args.new // 2), 2)
            rows.append(dict(depth=depth, batch=batch, medians=medians, ratios=ratios, floor_ms=floor, rows_with_the_same_text=same))
            for name, m in medians.items(): print(f"depth {depth:2} batch {batch:2}  {name:<22} prefill {m['prefill']:8,.0f} tokens/s   decode {m['decode']:7,.0f} tokens/s, {m['step_ms']:7.2f} ms a step", flush=True)
            print(f"depth {depth:2} batch {batch:2}  nanochat is {ratios['prefill']:.2f} times as fast in prefill and {ratios['decode']:.2f} times in decoding; {same:.0%} of the rows have the same text; floor of a step {floor:.2f} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    for name, value in dict(prompt=512, new=64, vocab_size=8192, rounds=3, threads=os.cpu_count()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--record", help="write the medians to this JSON file")
    args = parser.parse_args()
    import torch
    torch.set_num_threads(args.threads)
    results = [row for depth in args.depths for row in compare(args, depth)]
    settings = {key: value for key, value in vars(args).items() if key != "record"} | dict(torch=torch.__version__, transformers=__import__("transformers").__version__)
    if args.record: open(args.record, "w").write(json.dumps(dict(settings=settings, results=results), indent=1) + "\n")


if __name__ == "__main__": main()
