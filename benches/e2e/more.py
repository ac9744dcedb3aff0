#!/usr/bin/env python3
"""Measures that the harness lacks, run by it: how long bytes are in danger, and what a synchronous commit waits.

    more.py HARNESS exposure --tools pgrecall:rpo=1s pgrecall:rpo=0s --adapters benches/e2e ...
    more.py HARNESS commits --tools pgrecall:rpo=0s,level=1 pgrecall:rpo=0s,level=1,put_delay=20 ...
    more.py HARNESS parts --tools pgrecall:level=1 ...

HARNESS is its directory, the other arguments are those of its run.py. Exposure is seen from outside: the server is asked, over
and over, up to where its WAL is written and up to where the daemon has said that it is stored.
"""

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(sys.argv[1]).resolve()))

import run  # noqa: E402
from harness import data, measures, procs  # noqa: E402

LOAD_SECONDS = 15
# A query of its own each time: within one, the server would answer from the statistics that it has read once.
SAMPLE = """SELECT extract(epoch FROM clock_timestamp()), pg_current_wal_flush_lsn() - '0/0', min(flush_lsn) - '0/0'
    FROM pg_stat_replication WHERE application_name = '{name}' \\watch 0.002
"""


def sampled(lab, name, work):
    """Samples while `work` runs, and until all that it wrote is stored."""
    script, out = (lab.folder("samples") / f"{time.monotonic_ns()}.{kind}" for kind in ("sql", "out"))
    script.write_text(SAMPLE.format(name=name))
    with open(out, "wb") as f:
        asking = procs.spawn(lab.load, lab.primary.psql("-f", script), stdout=f, log=lab.log)
        try:
            work()
            time.sleep(2.5)
        finally:
            asking.terminate()
            asking.wait(20)
    rows = [line.split("|") for line in out.read_text().splitlines()]
    return [(float(r[0]), int(r[1]), int(r[2])) for r in rows if len(r) == 3 and all(r)]


def exposures(samples):
    """For each position that was seen first at some time: how much later it was seen to be stored."""
    waits, later = [], 0
    for at, (begin, written, _) in enumerate(samples):
        if at and written == samples[at - 1][1]:
            continue
        later = max(later, at)
        while later < len(samples) and samples[later][2] < written:
            later += 1
        if later == len(samples):
            break       # what was written when the samples ended
        waits.append(samples[later][0] - begin)
    return sorted(waits)


def percentiles(values, prefix, scale=1e3):
    if len(values) < 20:
        raise procs.Failed(f"{prefix}: only {len(values)} samples")
    return {f"{prefix}_p50_ms": values[len(values) // 2] * scale, f"{prefix}_p99_ms": values[len(values) * 99 // 100] * scale}


def exposure(lab, tool):
    """From a commit until it is in the store, under load (eight clients) and with one writer of 0.2 MiB/s."""
    measures.open_primary(lab, tool)
    scripts = data.write_scripts(lab.folder("load"))
    out = {}
    for prefix, script, clients, more in (("load", "load.sql", 8, []), ("calm", "calm.sql", 1, ["--rate=93"])):
        args = ["-D", "n=0", "-D", f"naccounts={lab.scale * 100000}", "-f", scripts / script, "-c", clients,
                "-j", min(2, clients), "-T", LOAD_SECONDS, *more]
        samples = sampled(lab, tool.synchronous_name(), lambda: lab.primary.pgbench(lab.load, *args, log=lab.log))
        out |= percentiles(exposures(samples), prefix)
    return out


def commits(lab, tool):
    """Latency of commits that wait until they are stored, with 1, 8 and 32 clients, beside the PUTs of the same time and
    beside the same load whose commits wait for the server's own disk only."""
    measures.open_primary(lab, tool)
    lab.primary.ask(f"ALTER SYSTEM SET synchronous_standby_names = '{tool.synchronous_name()}'")
    lab.primary.ask("SELECT pg_reload_conf()")
    out = {}
    for clients in (1, 8, 32):
        local = latencies(lab, f"local{clients}", clients, "local")
        before = len(tool.proxy.puts) if tool.proxy else 0
        micros = latencies(lab, f"load{clients}", clients, "on")
        out |= percentiles(micros, f"{clients}", 1e-3)
        out[f"{clients}_local_p50_ms"] = local[len(local) // 2] / 1e3
        if tool.proxy:
            took = sorted(seconds for _, seconds in tool.proxy.puts[before:])
            out[f"{clients}_put_p50_ms"] = took[len(took) // 2] * 1e3
            out[f"{clients}_per_put"] = out[f"{clients}_p50_ms"] / out[f"{clients}_put_p50_ms"]
    return out


def latencies(lab, name, clients, commit):
    """Of ten seconds of load, in microseconds; `commit` is the server's `synchronous_commit`."""
    lab.primary.ask(f"ALTER SYSTEM SET synchronous_commit = '{commit}'")
    lab.primary.ask("SELECT pg_reload_conf()")
    folder = lab.folder(name)
    scripts = data.write_scripts(folder)
    lab.primary.pgbench(lab.load, "-l", "--log-prefix=acked", "-D", "n=0", "-D", f"naccounts={lab.scale * 100000}",
                        "-f", scripts / "load.sql", "-c", clients, "-j", min(2, clients), "-T", 10, log=lab.log, cwd=folder)
    return sorted(int(line.split()[2]) for f in folder.glob("acked.*") for line in f.read_text().splitlines())


def parts(lab, tool):
    """The bytes of M4 as they are at its end, and without the parts of segments that are stored whole."""
    measures.open_primary(lab, tool)
    tool.backup(True)
    measures.wait_stored(lab, tool, lab.primary.switch())
    lab.primary.ask("CHECKPOINT")
    first, before = lab.primary.segment(), lab.store.objects()
    data.bulk(lab, lab.transactions)
    last = lab.primary.switch()
    measures.wait_stored(lab, tool, last)
    count = len(measures.segments(first, last))
    whole = lambda names: sum(name.endswith(".wal") for name in names)      # noqa: E731
    procs.wait_for(lambda: whole(lab.store.objects()) - whole(before) >= count, 60, "the segments to be stored whole", 0.5)
    added = {name: size for name, size in lab.store.objects().items() if name not in before}
    kept = {name: size for name, size in added.items() if ".parts/" not in name}
    return {"wal_mib": count * 16, "stored_mib": sum(added.values()) / 2**20, "later_mib": sum(kept.values()) / 2**20}


if __name__ == "__main__":
    del sys.argv[1]
    measures.MEASURES.update(exposure=exposure, commits=commits, parts=parts)
    try:
        run.main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{error}: {(error.stderr or b'')[-500:]!r}") from error
