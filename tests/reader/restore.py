#!/usr/bin/env python3
"""Restores a backup and its WAL from a repository, without any code of pgrecall.

Written from docs/repository-format.md alone, to prove that the prose suffices: whoever has the bucket's objects (and, where
encrypted, the master key) needs no program of ours. Standard library, zstandard, and for encrypted repositories cryptography.

    restore.py REPOSITORY/ENVIRONMENT TARGET [--backup ID] [--master-key FILE] [--tablespaces DIR] [--to LSN]

REPOSITORY is a directory, or a copy of a bucket in one. TARGET becomes a data directory that PostgreSQL, when started,
recovers to the end of the stored WAL of the latest timeline, or to the record that starts at LSN.
"""

import argparse
import collections
import hashlib
import hmac
import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import zstandard

PIECE = 65536
HEADER = struct.Struct("<8sBcBBIQ32sQ16s")
Header = collections.namedtuple("Header", "magic version kind sealed zero key_id length digest body salt")


def check(holds, what):
    """Ends with an error when an object is not what the format says."""
    if not holds:
        sys.exit(f"error: {what}")


class Keys:
    """What opens sealed bytes; of an unencrypted repository only digests are needed."""

    def __init__(self, root, master_file):
        self.data = {}
        if master_file is None:
            return
        master = bytes.fromhex(master_file.read_text().strip())
        fingerprint = hashlib.sha256(b"pgrecall master key " + master).digest()[:8].hex()
        for path in sorted((root / "keys").iterdir()):
            found = re.fullmatch(r"([0-9a-f]{8})\.master-([0-9a-f]+)", path.name)
            if found and found[2] == fingerprint:
                wrap = json.loads(path.read_bytes())
                check(wrap["wrap"] == "aes-256-gcm" and wrap["master"] == fingerprint, f"{path}: wrap")
                wrapped = bytes.fromhex(wrap["wrapped"])
                self.data[wrap["key_id"]] = gcm_open(master, wrapped[:12], wrapped[12:], f"keys/{path.name}")
        check(self.data, f"no key object is for this master key ({fingerprint})")

    def digest(self, key_id, content):
        if not key_id:
            return hashlib.sha256(content).digest()
        return hmac.new(hkdf(self.data[key_id], b"", b"pgrecall names"), content, hashlib.sha256).digest()


def gcm_open(key, nonce, sealed, name):
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    return AESGCM(key).decrypt(nonce, sealed, name.encode())


def hkdf(secret, salt, info):
    """HKDF-SHA256, 32 bytes: one block of the expansion."""
    extracted = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def lsn(text):
    return int(text.split("/")[0], 16) << 32 | int(text.split("/")[1], 16)


def decompress(data, length):
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    check(len(plain) == length, f"{len(plain)} bytes instead of {length}")
    return plain


class Repository:
    """One environment's objects, read and checked."""

    def __init__(self, root, master_file):
        self.root = root
        form = json.loads((root / "format.json").read_bytes())
        check(form["format"] == "pgrecall" and form["version"] == 1, "another format")
        sealed = form["data_key"] is not None
        check(sealed == (master_file is not None), f"encrypted is {sealed}: see --master-key")
        self.keys, self.packs = Keys(root, master_file), {}
        self.incarnation = max(n for n in os.listdir(root / "identity") if re.fullmatch(r"\d{4}-\d+", n))

    def header(self, name, data, kind):
        check(len(data) >= HEADER.size, f"{name}: shorter than a header")
        header = Header._make(HEADER.unpack_from(data))
        check(header.magic == b"PGRECALL" and header.version == 1, f"{name}: no object of version 1")
        check(header.kind == kind, f"{name}: kind {header.kind} instead of {kind}")
        return header

    def content(self, name, kind):
        """The content of an object that is compressed as a whole."""
        data = (self.root / name).read_bytes()
        header = self.header(name, data, kind)
        body = data[HEADER.size:]
        check(len(body) == header.body, f"{name}: body of another length")
        if header.sealed:
            body = self.open_pieces(name, header, body)
        content = decompress(body, header.length)
        digest = self.keys.digest(header.key_id if header.sealed else 0, content)
        check(digest == header.digest, f"{name}: another digest")
        return content, digest[:16].hex()

    def open_pieces(self, name, header, body):
        key = hkdf(self.keys.data[header.key_id], header.salt, b"pgrecall object")
        pieces = [body[at:at + PIECE + 16] for at in range(0, len(body), PIECE + 16)]
        nonces = [bytes(7) + struct.pack(">IB", n, n == len(pieces) - 1) for n in range(len(pieces))]
        return b"".join(gcm_open(key, nonce, piece, name) for nonce, piece in zip(nonces, pieces))

    def named(self, name, kind, digest):
        """Content whose name carries its digest."""
        content, found = self.content(name, kind)
        check(found == digest, f"{name}: the name carries another digest")
        return content

    def frame(self, packs, address):
        """The content of a frame: [pack, offset, stored bytes, plain bytes, hash]."""
        index, offset, stored, plain, digest = address
        backup, number, salt = packs[index]
        name = f"{self.incarnation}/packs/{backup}/{number:06}.pack"
        if name not in self.packs:
            file = open(self.root / name, "rb")
            header = self.header(name, file.read(HEADER.size), b"P")
            check(header.salt.hex() == salt, f"{name}: another salt")
            self.packs[name] = file, header
        file, header = self.packs[name]
        file.seek(offset)
        data = file.read(stored)
        check(len(data) == stored, f"{name}: ends before {offset + stored}")
        if header.sealed:
            key = hkdf(self.keys.data[header.key_id], header.salt, b"pgrecall object")
            data = gcm_open(key, b"FRAM" + struct.pack(">Q", offset), data, name)
        content = decompress(data, plain)
        found = self.keys.digest(header.key_id if header.sealed else 0, content)[:16].hex()
        check(found == digest, f"{name}: another digest at {offset}")
        return content

    def backup(self, wanted):
        """The newest backup, or the wanted one."""
        folder = f"{self.incarnation}/backups"
        names = set(os.listdir(self.root / folder))
        ids = [n[:-7] for n in names if n.endswith(".backup") and n[:-7] + ".dropped" not in names]
        chosen = wanted or max(ids, default=None)
        check(chosen in ids, f"no such backup: {chosen}; there are {sorted(ids)}")
        return chosen, json.loads(self.content(f"{folder}/{chosen}.backup", b"B")[0])

    def files(self, backup):
        """Every file of a backup, with its extents and the packs that they index."""
        tables = backup["tables"]
        for table in tables["tables"]:
            lines = [json.loads(line) for line in self.frame(tables["packs"], table["frame"]).splitlines()]
            check(len(lines) == table["files"] + 1, f"table of {table['first']}: another number of files")
            yield from ((file, lines[0]) for file in lines[1:])

    def extents(self, file, packs):
        """Extents of a file, each with the packs that it indexes."""
        yield from ((extent, packs) for extent in file.get("x", []))
        for address in file.get("xt", []):
            lines = [json.loads(line) for line in self.frame(packs, address).splitlines()]
            yield from ((extent, lines[0]) for extent in lines[1:])


def check_space(backup, target, tablespaces):
    """Adds up what goes to each file system, before anything is written."""
    needs = {tablespaces / str(t["oid"]) if tablespaces else Path(t["path"]): t["bytes"]
             for t in backup["tablespaces"] if t["path"].startswith("/")}
    needs[target] = backup["totals"]["bytes"] - sum(needs.values())
    total = collections.Counter()
    for place, needed in needs.items():
        there = next(p for p in (place, *place.absolute().parents) if p.exists())
        device, free = there.stat().st_dev, shutil.disk_usage(there).free
        total[device] += needed
        check(total[device] <= free, f"{total[device]} bytes are needed on the file system of {there}, {free} are free")


def write_files(repository, backup, target, tablespaces):
    """Writes the data directory; gives the number of files. Directories get their modes last: some are read-only."""
    files = list(repository.files(backup))
    moved = {}
    for file, packs in files:
        if file["p"] == "tablespace_map":
            pairs = [line.split(" ", 1) for line in read_file(repository, file, packs).decode().splitlines()]
            moved = {oid: tablespaces / oid if tablespaces else Path(old) for oid, old in pairs}

    def place(path):
        parts = path.split("/")
        check(not path.startswith("/") and ".." not in parts, f"path {path} leaves the directory")
        if parts[0] == "pg_tblspc" and len(parts) > 1 and parts[1] in moved:
            return moved[parts[1]].joinpath(*parts[2:])
        return target.joinpath(*parts)

    for file, packs in files:
        path = place(file["p"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if file["k"] == "d":
            path.mkdir(exist_ok=True)
        elif file["k"] == "l":
            path.symlink_to(file["l"])
        elif file["p"] == "tablespace_map":
            path.write_text("".join(f"{oid} {new}\n" for oid, new in moved.items()))
        else:
            path.write_bytes(read_file(repository, file, packs))
    for file in (f for f, _ in files if f["k"] != "l"):
        os.chmod(place(file["p"]), file["m"])
    os.chmod(target, 0o700)
    return sum(file["k"] == "f" for file, _ in files)


def read_file(repository, file, packs):
    """The content of one file: at most 1 GB, as PostgreSQL cuts its relations."""
    content, last, frame = bytearray(file["z"]), None, None
    for (offset, length, start, address), packs_of in repository.extents(file, packs):
        if (address, packs_of) != last:
            frame, last = repository.frame(packs_of, address), (address, packs_of)
        piece = frame[start:start + length]
        check(len(piece) == length and offset + length <= len(content), f"{file['p']}: extent at {offset}")
        content[offset:offset + length] = piece
    return bytes(content)


def write_wal(repository, backup, target):
    """Writes every stored segment from the backup's start on, of all timelines, and all history files."""
    size = backup["segment_size"]
    first = lsn(backup["start_lsn"]) // size
    base = f"{repository.incarnation}/wal"
    wal = repository.root / base
    (target / "pg_wal").mkdir(exist_ok=True)
    reached = 0
    for timeline in sorted(os.listdir(wal)):
        segments = collections.defaultdict(list)
        for name in sorted(os.listdir(wal / timeline)):
            if found := re.fullmatch(r"history-([0-9a-f]{32})", name):
                history = repository.named(f"{base}/{timeline}/{name}", b"H", found[1])
                (target / f"pg_wal/{timeline}.history").write_bytes(history)
            elif found := re.fullmatch(r"([0-9A-F]{24})-([0-9a-f]{32})\.wal", name):
                segments[found[1]].append((0, size, found[2], f"{base}/{timeline}/{name}"))
            elif found := re.fullmatch(r"([0-9A-F]{24})\.parts", name):
                for part in os.listdir(wal / timeline / name):
                    if p := re.fullmatch(r"([0-9A-F]{8})-([0-9A-F]{8})-([0-9a-f]{32})\.part", part):
                        segments[found[1]].append((int(p[1], 16), int(p[2], 16), p[3], f"{base}/{timeline}/{name}/{part}"))
        for name, pieces in sorted(segments.items()):
            number = int(name[8:16], 16) * (0x100000000 // size) + int(name[16:], 16)
            if number >= first:
                content = assemble(repository, sorted(pieces), size)
                (target / "pg_wal" / name).write_bytes(content.ljust(size, b"\0"))
                reached = max(reached, number * size + len(content))
    check(reached >= lsn(backup["stop_lsn"]), "the stored WAL ends before the backup does")


def assemble(repository, pieces, size):
    """The bytes of a segment from its start, as far as they are covered without a hole."""
    content = bytearray()
    for start, end, digest, name in pieces:
        if start > len(content):
            break
        if end > len(content) or start == 0:
            bytes_ = repository.named(name, b"W", digest)
            check(len(bytes_) == end - start and end <= size, f"{name}: {len(bytes_)} bytes")
            known = content[start:end]
            check(bytes_[:len(known)] == known, f"{name}: other bytes than its neighbours")
            content[start:end] = bytes_ + content[start + len(bytes_):end]
    return bytes(content)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("environment", "target", "--master-key", "--tablespaces"):
        parser.add_argument(name, type=Path)
    for name in ("--backup", "--to"):
        parser.add_argument(name)
    args = parser.parse_args()
    check(not args.target.exists() or not any(args.target.iterdir()), f"{args.target} is not empty")
    repository = Repository(args.environment, args.master_key)
    chosen, backup = repository.backup(args.backup)
    check_space(backup, args.target, args.tablespaces)
    args.target.mkdir(exist_ok=True)
    count = write_files(repository, backup, args.target, args.tablespaces)
    write_wal(repository, backup, args.target)
    with open(args.target / "postgresql.auto.conf", "a") as out:
        out.write("restore_command = '/bin/false'\nrecovery_target_timeline = 'latest'\n")
        if args.to:
            out.write(f"recovery_target_lsn = '{args.to}'\nrecovery_target_action = 'promote'\n")
    (args.target / "recovery.signal").touch()
    print(f"restored {count} files of backup {chosen} for PostgreSQL {backup['major']}")


if __name__ == "__main__":
    main()
