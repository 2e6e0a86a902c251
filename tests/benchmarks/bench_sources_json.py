"""A JSON list of chats, read by us and by `json.load`: samples per second, and memory for 1 GB.

    python tests/benchmarks/bench_sources_json.py [--megabytes 1024] [--rounds 5]

The file is built of the records of tests/data/llava_coco_qa over and over, each with an id of its own. Every measurement is a process of its own. Speeds are compared in turns, several times, on a tenth of the file:

- `ours` walks the source: every record becomes a checked Sample whose image file is known to be there;
- `load + samples` does that to a list from `json.load`, with the same functions: the obvious way to the same result;
- `load + dicts` reads with `json.load` and looks at no more than each record's turns and image name: the least that any reader must do."""
import argparse, json, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"


def build(path, megabytes):
    "Write the list; returns how many records it has."
    records, count, size = json.loads((DATA / "llava_coco_qa/llava_demo.json").read_text()), 0, 0
    turns = [turn for record in records for turn in record["conversations"] if "<image>" not in turn["value"]]
    with open(path, "w") as file:
        file.write("[")
        while size < megabytes * 2**20:
            record = records[count % len(records)]
            pair = [turns[2 * count % (len(turns) - 1)] | {"from": "human"}, turns[(2 * count + 1) % len(turns)] | {"from": "gpt"}]
            size += file.write((", " if count else "") + json.dumps({**record, "id": f"{count:09}", "conversations": record["conversations"] + 4 * pair}))
            count += 1
        file.write("]")
    return count


def ours(path):
    from embodied_midtrain.sources.chat import LlavaSource
    return sum(1 for _ in LlavaSource("bench", path, images=str(DATA)))


def load_samples(path):
    from embodied_midtrain.samples import check
    from embodied_midtrain.sources.base import Record
    from embodied_midtrain.sources.chat import LlavaSource
    source = LlavaSource("bench", path, images=str(DATA))
    roots = source.parts[""][1]
    return sum(1 for i, value in enumerate(json.load(open(path, encoding="utf-8"))) for _ in map(check, source.parse(Record(str(i), path, (value, roots)))))


def load_dicts(path):
    return sum(1 for value in json.load(open(path, encoding="utf-8")) if ([(t["from"], t["value"]) for t in value["conversations"]], value.get("image")))


WAYS = {"ours": ours, "load + samples": load_samples, "load + dicts": load_dicts}


def measured(way, path):
    "Run one way in a process of its own: (records, seconds, peak MB of memory)."
    out = subprocess.run([sys.executable, __file__, "--way", way, "--path", str(path)], capture_output=True, text=True, check=True).stdout
    return json.loads(out)


def child(way, path):
    import embodied_midtrain.sources.chat  # the import is not measured as time, but as memory
    start = time.perf_counter()
    count = WAYS[way](path)
    print(json.dumps([count, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way"), parser.add_argument("--path")
    options = parser.parse_args()
    if options.way: return child(options.way, options.path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.json"
        count = build(path, options.megabytes / 10)
        rounds = [{way: measured(way, path)[1] for way in WAYS} for _ in range(options.rounds)]
        for way in WAYS: print(f"{way:15} {count / statistics.median(r[way] for r in rounds):9,.0f} records/s, {path.stat().st_size / 2**20:.0f} MB, median of {options.rounds}")
        for way in list(WAYS)[1:]:
            ratios = sorted(r[way] / r["ours"] for r in rounds)
            print(f"ours : {way:15} {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")
        count = build(path, options.megabytes)
        for way in WAYS:
            read, seconds, peak = measured(way, path)
            assert read == count, (way, read, count)
            print(f"{way:15} {path.stat().st_size / 2**20:,.0f} MB, {count:,} records: {seconds:.1f} s, peak memory {peak:,.0f} MB")


if __name__ == "__main__": main()
