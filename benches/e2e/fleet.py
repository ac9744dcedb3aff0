#!/usr/bin/env python3
"""Many environments under one daemon: what it costs while nothing happens, what one that hangs costs the others, how long a start
and `status` take.

    sudo benches/e2e/fleet.py target/release/pgrecall [--clusters 20] [--environments 200] [--seconds 60] [--keep]

Each cluster is a small PostgreSQL of its own (by default the newest major of scripts/setup-tests); several environments archive the
same cluster through slots of their own. Repositories are directories. As root everything runs as the user `postgres`. Prints one JSON
document; nothing is left behind.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

AS_USER = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []


def run(*command, **options):
    return subprocess.run([*AS_USER, *map(str, command)], check=True, capture_output=True, text=True, **options).stdout


class Cluster:
    def __init__(self, number, bin_dir, folder, senders):
        self.bin, self.data, self.port, self.senders = bin_dir, folder / f"c{number}", 20000 + number, senders
        self.socket = folder
        self.pid = None

    def start(self, template):
        run("cp", "-a", template, self.data)
        settings = {
            "port": self.port, "unix_socket_directories": f"'{self.socket}'", "listen_addresses": "''", "fsync": "off",
            "shared_buffers": "16MB", "max_wal_senders": self.senders + 6, "max_replication_slots": self.senders + 4,
            "max_connections": 60, "autovacuum": "off", "max_slot_wal_keep_size": "4GB", "logging_collector": "off",
        }
        with open(self.data / "postgresql.conf", "a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        run(self.bin / "pg_ctl", "-D", self.data, "-w", "-l", self.data / "log", "start")
        self.pid = int((self.data / "postmaster.pid").read_text().split()[0])

    def stop(self):
        run(self.bin / "pg_ctl", "-D", self.data, "-w", "-m", "immediate", "stop")

    def ask(self, sql):
        psql = [self.bin / "psql", "-XAtq", "-h", self.socket, "-p", self.port, "-U", "postgres", "-c", sql]
        return run(*psql).strip()

    def streaming(self):
        return int(self.ask("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"))

    def stored_after(self):
        """Seconds from a commit until every slot of the cluster has been told that it is stored, on one connection."""
        sql = """DO $$ DECLARE l pg_lsn; b timestamptz; BEGIN
            l := pg_logical_emit_message(false, 'fleet', 'x'); PERFORM pg_switch_wal(); b := clock_timestamp();
            WHILE EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming' AND flush_lsn < l) LOOP
                PERFORM pg_stat_clear_snapshot(), pg_sleep(0.005);
                IF clock_timestamp() > b + interval '60 s' THEN RAISE 'not stored within a minute'; END IF;
            END LOOP;
            RAISE NOTICE 'after % s', extract(epoch FROM clock_timestamp() - b); END $$"""
        psql = [self.bin / "psql", "-Xq", "-h", self.socket, "-p", self.port, "-U", "postgres", "-c", sql]
        said = subprocess.run([*AS_USER, *map(str, psql)], check=True, capture_output=True, text=True).stderr
        return float(said.split("after ")[1].split(" s")[0])

    def freeze(self, signal_number):
        """The whole server; children first when it goes on."""
        children = run("ps", "-o", "pid=", "--ppid", self.pid).split()
        for pid in [self.pid, *map(int, children)]:
            os.kill(int(pid), signal_number)


class Daemon:
    def __init__(self, program, folder, environments):
        self.program, self.folder, self.config = program, folder, folder / f"config-{len(environments)}.toml"
        text = [f'control_socket = "{folder}/control.sock"', "[log]", 'level = "warn"', "[defaults]",
                f'repository = "file://{folder}/repository-{len(environments)}"', 'backup_schedule = "0 0 1 1 *"']
        for name, cluster in environments:
            text += [f"[environment.{name}]", f'postgres = "host={cluster.socket} port={cluster.port} user=postgres dbname=postgres"']
        self.config.write_text("\n".join(text) + "\n")
        self.config.chmod(0o644)
        self.process = None

    def start(self):
        with open(self.folder / "daemon.log", "a") as log:
            command = [*AS_USER, self.program, "daemon", "--config", self.config]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(90)

    def status(self):
        said = subprocess.run([*AS_USER, self.program, "status", "--json", "--config", self.config], capture_output=True, text=True)
        return json.loads(said.stdout)["environments"] if said.stdout else []

    def memory_mib(self):
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        kib = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.startswith("Vm")}
        return int(kib["VmRSS"]) / 1024, int(kib["VmHWM"]) / 1024

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(what, seconds, probe):
    begin = time.monotonic()
    while not probe():
        if time.monotonic() - begin > seconds:
            raise SystemExit(f"waited {seconds} s in vain for {what}")
        time.sleep(0.05)
    return time.monotonic() - begin


def median_ms(command, times=15):
    def once():
        begin = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return (time.perf_counter() - begin) * 1000
    return statistics.median(once() for _ in range(times))


def start_of(program, folder, clusters):
    """From the start of the daemon to one stream from each cluster; then the same with repositories that are there."""
    daemon = Daemon(program, folder, [(f"one-{n}", cluster) for n, cluster in enumerate(clusters)])
    figures = []
    for _ in range(2):
        daemon.start()
        figures.append(wait_for("all to stream", 120, lambda: all(c.streaming() == 1 for c in clusters)))
        wait_for("all backups", 600, lambda: all(e["state"] == "protected" for e in daemon.status()))
        daemon.stop()
        wait_for("all streams to end", 30, lambda: all(c.streaming() == 0 for c in clusters))
    for cluster in clusters:
        cluster.ask("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
    return figures


def measure(options, folder, clusters):
    figures = {"clusters": len(clusters), "environments": options.environments}
    figures["start_s"], figures["start_again_s"] = start_of(options.program, folder, clusters)
    names = [(f"e{n:03}", clusters[n % len(clusters)]) for n in range(options.environments)]
    each = options.environments // len(clusters)
    daemon = Daemon(options.program, folder, names)
    try:
        daemon.start()
        streaming = lambda: sum(c.streaming() for c in clusters) >= each * len(clusters)
        figures["start_all_s"] = wait_for("all to stream", 300, streaming)
        figures["all_protected_s"] = wait_for("all to be protected", 1800, lambda: all_protected(daemon, names))
        # What a start leaves to do (surveys; tidying, in which the environments take turns) is done after a while.
        time.sleep(150)
        before, begin = daemon.cpu_seconds(), time.monotonic()
        time.sleep(options.seconds)
        figures["idle_cpu_percent"] = 100 * (daemon.cpu_seconds() - before) / (time.monotonic() - begin)
        figures["rss_mib"], figures["rss_max_mib"] = daemon.memory_mib()
        status = [*AS_USER, options.program, "status", "--config", str(daemon.config)]
        figures["true_ms"], figures["status_ms"] = median_ms([*AS_USER, "/bin/true"]), median_ms(status)
        figures["status_in_true"] = figures["status_ms"] / figures["true_ms"]
        figures.update(fairness(clusters))
        figures["all_protected_again_s"] = wait_for("all to be protected", 120, lambda: all_protected(daemon, names))
    finally:
        daemon.stop()
    return figures


def all_protected(daemon, names):
    states = [environment["state"] for environment in daemon.status()]
    return len(states) == len(names) and set(states) == {"protected"}


def fairness(clusters):
    stuck, others = clusters[0], clusters[1:]
    well = [cluster.stored_after() for cluster in others for _ in range(3)]
    stuck.freeze(signal.SIGSTOP)
    try:
        time.sleep(5)
        beside = [cluster.stored_after() for cluster in others for _ in range(3)]
    finally:
        stuck.freeze(signal.SIGCONT)
    return {
        "stored_after_s": statistics.median(well), "stored_after_max_s": max(well),
        "stored_after_beside_stuck_s": statistics.median(beside), "stored_after_beside_stuck_max_s": max(beside),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: str(pathlib.Path(path).resolve()))
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--environments", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--pgbin", type=pathlib.Path, default=pathlib.Path("/var/cache/pgrecall/postgresql/18/bin"))
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    # Whoever ends this ends the servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="pgrecall-fleet-"))
    shutil.chown(folder, *(["postgres", "postgres"] if AS_USER else [os.getuid(), os.getgid()]))
    each = options.environments // options.clusters
    clusters = [Cluster(n, options.pgbin, folder, each) for n in range(options.clusters)]
    try:
        run(options.pgbin / "initdb", "-D", folder / "template", "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C.UTF-8")
        for cluster in clusters:
            cluster.start(folder / "template")
        print(json.dumps({name: round(value, 3) for name, value in measure(options, folder, clusters).items()}, indent=2))
        log = (folder / "daemon.log").read_text()
        print(log[-2000:] if log else "", end="")
    finally:
        for cluster in clusters:
            if cluster.pid:
                cluster.stop()
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
