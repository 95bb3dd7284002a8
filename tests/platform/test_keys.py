"""API keys: what the file keeps, who gets in, and how often."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from eagleray.platform.keys import KeyChecker, KeyFileError, add_key, read_keys, remove_key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_file_holds_hashes_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    secret = add_key(path, "trainer", per_minute=60)
    assert len(secret) > 40 and secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    checker = KeyChecker(path)
    found = checker.owner(secret)
    assert found is not None and (found.name, found.per_minute) == ("trainer", 60)
    for wrong in ("", secret[:-1], secret + "x", found.sha256, "\ud800"):
        assert checker.owner(wrong) is None


def test_keys_come_and_go_while_a_server_runs(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    first = add_key(path, "first")
    checker = KeyChecker(path, clock=clock)
    second = add_key(path, "second")
    assert checker.owner(second) is None  # not looked yet
    clock.now = 2
    assert checker.owner(second) is not None and checker.owner(first) is not None
    remove_key(path, "first")
    clock.now = 4
    assert checker.owner(first) is None and [key.name for key in read_keys(path)] == ["second"]
    path.write_text("{")
    clock.now = 6
    assert checker.owner(second) is not None  # a broken file locks nobody out


def test_a_rate_lets_a_burst_through_and_fills_up_evenly(tmp_path: Path) -> None:
    """3 a minute: three at once, then one each 20 s; never more than three saved."""
    path, clock = tmp_path / "keys.json", Clock()
    secret = add_key(path, "slow", per_minute=3)
    checker = KeyChecker(path, clock=clock)
    key = checker.owner(secret)
    assert key is not None
    assert [checker.wait_s(key) for _ in range(4)] == [0, 0, 0, 20]
    clock.now = 15
    assert checker.wait_s(key) == 5
    clock.now = 20
    assert [checker.wait_s(key) for _ in range(2)] == [0, 20]
    clock.now = 1000
    assert [checker.wait_s(key) for _ in range(4)] == [0, 0, 0, 20]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(KeyFileError, match=r"There is no file .*Make a key with `eagleray keys add"):
        KeyChecker(path)
    add_key(path, "me")
    with pytest.raises(KeyFileError, match="has a key with the name 'me' already"):
        add_key(path, "me")
    with pytest.raises(KeyFileError, match="'a b' cannot be used: letters"):
        add_key(path, "a b")
    with pytest.raises(KeyFileError, match="no key with the name 'you'; it has: me"):
        remove_key(path, "you")
    path.write_text(json.dumps({"keys": [{"name": "x"}]}))
    with pytest.raises(KeyFileError, match="is not a file of keys"):
        read_keys(path)
