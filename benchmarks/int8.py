"""What a model loses and gains with weights of 8 bits: bits per byte on the run's validation text, bytes of its weights, processor time of a decoding step.

python benchmarks/int8.py --run NAME [--stages base] [--tokens 262144] [--batches 1 8 32] [--rounds 5] [--record FILE.json]

The same trained model three times: in float32, in bfloat16, and in 8 bits. Times are of the engine on a CPU, in turns, medians.
"""
import argparse, json, statistics, time
from pathlib import Path

import torch

from nanochat.checkpoint import load_model
from nanochat.common import Run, compute_init
from nanochat.engine import Engine
from nanochat.pretrain import validation_bits_per_byte
from training import cpu_features

NEW = 32  # tokens that each row writes


def formats(run: Run, stage: str) -> dict:
    "The model of a stage in every format; each is a (model, dtype of the engine)"
    def load(): return load_model(run, stage, torch.device("cpu"))[0].requires_grad_(False)
    return dict(float32=(load(), torch.float32), bfloat16=(load().to_inference(torch.bfloat16), torch.bfloat16), int8=(load().to_int8(), torch.float32))


def step_ms(model, dtype: torch.dtype, tokenizer, batch: int) -> float:
    "Processor milliseconds of a decoding step: the median of one batch's steps"
    engine, times = Engine(model, tokenizer, max_batch=batch, dtype=dtype), []
    engine.notable[:], engine.stops = False, set()  # nothing ends a row but its length
    prompt = [tokenizer.bos, *tokenizer.encode("Once upon a time")]
    for seed in range(batch): engine.submit(prompt, 1, NEW + 1, temperature=1.0, seed=seed)
    while engine.busy:
        start = time.process_time()
        engine.step()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--stages", nargs="+", default=["base"])
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", help="write the figures to this JSON file")
    args = parser.parse_args()
    run, compute, results = Run.open(args.run), compute_init("cpu"), {}
    torch.set_grad_enabled(False)
    for stage in args.stages:
        tokenizer, found, models = load_model(run, stage, compute.device)[1], {}, formats(run, stage)
        for name, (model, dtype) in models.items():
            model.compute_dtype = dtype
            found[name] = dict(megabytes=sum(t.nbytes for t in (*model.parameters(), *(b for k, b in model.named_buffers() if k.endswith(("weight", "scale"))))) / 1e6, step_ms={},
                               bpb=validation_bits_per_byte(model, run, tokenizer, compute, 16, model.config.sequence_len, args.tokens))
        for batch in args.batches:
            rounds = [{name: step_ms(*each, tokenizer, batch) for name, each in models.items()} for _ in range(1 + args.rounds)][1:]  # the first warms up
            for name in models: found[name]["step_ms"][str(batch)] = round(statistics.median(each[name] for each in rounds), 3)
        results[stage] = found
        for name, row in found.items():
            print(f"{stage}  {name:<9} {row['bpb']:.5f} bits per byte ({row['bpb'] - found['float32']['bpb']:+.5f})   {row['megabytes']:7.2f} MB   "
                  + ", ".join(f"{ms:.2f} ms a step of {batch}" for batch, ms in row["step_ms"].items()), flush=True)
    if args.record:
        record = dict(options={key: value for key, value in vars(args).items() if key not in ("run", "record")}, depth=model.config.n_layer, width=model.config.n_embd, vocab_size=model.config.vocab_size, cpu=cpu_features(),
                      threads=torch.get_num_threads(), torch=torch.__version__, stages=results)
        Path(args.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__": main()
