"""pgrecall: its daemon on the primary's host, straight from the replication protocol to the store.

Options: `level` is zstd's, `rpo` the bound of exposure, `sync=y` names the daemon for synchronous commits (M9). No command of
PostgreSQL runs for it. It keeps nothing on local disk, so in M5 its configuration is all that is left of it. The program is
the release build: PGRECALL_BIN, or what is found as `pgrecall`. With `put_delay` (milliseconds, 0 too) it reaches the store
through a proxy that makes every PUT so much longer and notes what each took.
"""

import json
import os
import re
import subprocess

from harness import procs
from tools.base import Tool, binary
from tools.slow_puts import SlowPuts

ENVIRONMENT = "demo"


class Adapter(Tool):
    stores = {"posix", "minio"}
    remote = False
    daemon = True
    defaults = {"level": "3", "rpo": "1s", "sync": "n", "puts": "4", "put_delay": ""}

    def __init__(self, *args):
        super().__init__(*args)
        self.bin = os.environ.get("PGRECALL_BIN") or binary(self.lab, "pgrecall")
        self.config = self.dir / "config.toml"
        self.process = self.proxy = None

    def version(self):
        return subprocess.check_output([self.bin, "--version"], text=True).strip()

    def settings(self):
        return {}

    def env(self):
        return {**super().env(), "PGRECALL_CONFIG": str(self.config)}

    def setup(self):
        store, primary = self.lab.store, self.lab.primary
        name = f"environment.{ENVIRONMENT}"
        lines = [f'control_socket = "{self.dir}/control.sock"', f"[{name}]"]
        lines += [f'postgres = "host={primary.socket} port={primary.port} user={procs.USER} dbname=postgres"']
        lines += [f'rpo = "{self.opt["rpo"]}"', f"compression_level = {self.opt['level']}"]
        lines += [f"puts_in_flight = {self.opt['puts']}", 'application_name = "pgrecall"']
        if store.kind == "posix":
            lines += [f'repository = "file://{store.path}"']
        else:
            lines += [f'repository = "s3://{store.bucket}/pgrecall"', f"[{name}.s3]", 'region = "us-east-1"']
            lines += self._endpoint(store)
            for key, value in (("access_key_id", store.key), ("secret_access_key", store.secret)):
                self._secret(self.dir / key, value)
                lines += [f'{key}_file = "{self.dir / key}"']
        lines += [f"[{name}.restore]", f'postgres_bin_dirs = ["{self.lab.pgbin}"]']
        self._secret(self.config, "\n".join(lines) + "\n")

    def _endpoint(self, store):
        if not self.opt["put_delay"]:
            return [f'endpoint = "{store.endpoint}"', f'ca_file = "{store.ca}"']
        self.proxy = SlowPuts(store.endpoint, store.ca, float(self.opt["put_delay"]))
        return [f'endpoint = "{self.proxy.start()}"', "allow_http = true"]

    def _secret(self, path, text):
        path.touch(mode=0o600)
        path.write_text(text)
        os.chown(path, self.dir.stat().st_uid, self.dir.stat().st_gid)

    def start(self):
        self.process = self.spawn([self.bin, "daemon"])
        procs.wait_for(self._streams, 60, "pgrecall to stream")
        # The daemon takes the first backup by itself: the one that is measured must not share the machine with it.
        procs.wait_for(lambda: self.backups()["backups"], 300, "the daemon's own first backup")

    def _streams(self):
        return self.lab.primary.ask("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", check=False) != "0"

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        if self.proxy:
            self.proxy.stop()

    def backup(self, first):
        self.run([self.bin, "backup", ENVIRONMENT])

    def backups(self):
        answer = subprocess.check_output([*procs.AS_USER, self.bin, "--config", self.config, "backups", ENVIRONMENT, "--json"])
        return json.loads(answer)

    def restore(self, target_dir, time=None):
        self.run([self.bin, "restore", ENVIRONMENT, "--to", time or "latest", "--into", target_dir, "--no-start",
                  "--finish", "promote"])

    def stored(self, segment, names):
        """Whole, or in parts that cover it."""
        ranges = []
        for name in names:
            if re.search(segment + r"-[0-9a-f]{32}\.wal$", name):
                return True
            if part := re.search(segment + r"\.parts/([0-9A-F]{8})-([0-9A-F]{8})-", name):
                ranges.append((int(part[1], 16), int(part[2], 16)))
        covered = 0
        for start, end in sorted(ranges):
            if start > covered:
                return False
            covered = max(covered, end)
        return covered >= self.lab.segment_size

    def synchronous_name(self):
        return "pgrecall"
