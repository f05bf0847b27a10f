"""No secret passes `redacted`, in whatever it stands and however a stream is cut; all other text passes as it is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmms_prune.record.redaction import (
    MARK,
    SHORTEST,
    printed,
    redacted,
    redacted_lines,
    redacted_values,
    secret_values,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS, HEX = "0123456789", "0123456789abcdef"
ALPHANUMERIC = LETTERS + LETTERS.upper() + DIGITS


def drawn(letters: str, low: int, high: int) -> st.SearchStrategy[str]:
    """Random text as keys are: with a capital and a digit somewhere."""
    return st.text(letters, min_size=low - 2, max_size=high - 2).map(lambda text: f"{text[:1]}A7{text[1:]}")


# What a log may say, and the part of it that is secret.
FORMS = {
    "hf": drawn(ALPHANUMERIC, 34, 34).map(lambda key: (f"hf_{key}",) * 2),
    "openai": drawn(f"{ALPHANUMERIC}-_", 24, 160).map(lambda key: (f" sk-{key}", f"sk-{key}")),
    "openai, quoted": drawn(f"{ALPHANUMERIC}-_", 24, 160).map(lambda key: (f"\\nsk-{key}", f"sk-{key}")),
    "github": drawn(ALPHANUMERIC, 36, 36).flatmap(lambda key: st.sampled_from([f"gh{kind}_{key}" for kind in "pousr"])),
    "github, fine": drawn(ALPHANUMERIC + "_", 82, 82).map(lambda key: f"github_pat_{key}"),
    "gitlab": drawn(ALPHANUMERIC, 20, 20).map(lambda key: f"glpat-{key}"),
    "slack": drawn(DIGITS, 20, 40).map(lambda key: f"xoxb-{key}"),
    "google": drawn(ALPHANUMERIC, 35, 35).map(lambda key: f"AIza{key}"),
    "aws": st.text(LETTERS.upper() + DIGITS, min_size=16, max_size=16).map(lambda key: f"AKIA{key}"),
    "wandb": st.text(HEX, min_size=39, max_size=39).map(lambda key: (f"WANDB_API_KEY=7{key}", f"7{key}")),
    "wandb in JSON": st.text(HEX, min_size=39, max_size=39).map(lambda key: (f'"wandb_api_key": "7{key}"', f"7{key}")),
    "aws secret": drawn(ALPHANUMERIC + "/+", 40, 40).map(lambda key: (f"AWS_SECRET_ACCESS_KEY={key}", key)),
    "password": drawn(ALPHANUMERIC + "!$%", 10, 20).map(lambda key: (f"password='{key}'", key)),
    "bearer": drawn(ALPHANUMERIC + "._~+/-", 20, 200).map(lambda key: (f"Authorization: Bearer {key}", key)),
    "basic": drawn(ALPHANUMERIC + "+/", 12, 40).map(lambda key: (f"'Authorization': 'Basic {key}='", key)),
    "jwt": st.lists(drawn(ALPHANUMERIC + "-_", 20, 60), min_size=3, max_size=3).map(lambda p: f"eyJ{'.'.join(p)}"),
    "url": drawn(ALPHANUMERIC + "@!", 6, 20).map(lambda key: (f"https://me:{key}@host/x", f":{key}@")),
}
IN_TEXT = st.sampled_from(sorted(FORMS)).flatmap(FORMS.get).map(lambda one: (one, one) if isinstance(one, str) else one)
# Values of variables: whatever people take for a password.
VALUES = st.text(min_size=SHORTEST, max_size=60).map(str.strip).filter(lambda text: len(text) >= SHORTEST)
AROUND = st.text(max_size=40)
TELLING = ("hf_", "gh", "sk-", "xox", "aiza", "akia", "asia", "eyj", "bearer", "auth", "key", "secret", "pass", "token")


@given(AROUND, IN_TEXT, AROUND)
def test_what_is_known_by_its_form_does_not_pass(before: str, secret: tuple[str, str], after: str) -> None:
    text, hidden = secret
    clean = redacted(f"{before} {text} {after}")
    assert hidden not in clean
    assert MARK in clean
    assert redacted(clean) == clean


@given(st.lists(VALUES, min_size=1, max_size=3), st.lists(AROUND, min_size=4, max_size=4), st.data())
def test_what_the_environment_keeps_secret_does_not_pass(values: list[str], around: list[str], data) -> None:
    """As it is, and as Python, JSON or a URL writes it; alone, side by side and over each other."""
    secrets = secret_values({f"MY_TOKEN_{number}": value for number, value in enumerate(values)})
    writers = st.sampled_from([str, repr, json.dumps, lambda text: json.dumps(text, ensure_ascii=False), _quoted])
    parts = [data.draw(writers)(data.draw(st.sampled_from(values))) for _ in around]
    text = "".join(part for pair in zip(around, parts, strict=True) for part in pair)
    clean = redacted(text, secrets)
    for part in clean.split(MARK):
        assert not [secret for secret in secrets if secret in part]
    assert redacted(clean, secrets) == clean


def _quoted(text: str) -> str:
    return quote(text.encode("utf-8", "replace"), safe="")


@given(st.text().filter(lambda text: not any(word in text.lower() for word in (*TELLING, "://"))))
def test_text_without_a_secret_passes_as_it_is(text: str) -> None:
    assert redacted(text, ("another secret",)) == text
    assert "".join(redacted_lines([text.encode("utf-8", "replace")])) == text.encode("utf-8", "replace").decode()


@given(st.recursive(AROUND | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(AROUND, inner)))
@example({"a": ["hf_" + "x1" * 17], "hf_" + "y2" * 17: {"b": 1}})
@example({"PASSPHRASE": -1000000})
@example([{"api_key": 1234567890123456789}, {"client_secret": 10**300, "a": 0}])
@example({"wandb_api_key": "0123abcd" * 5, "password": "horse staple 1"})
def test_jsons_values_stay_what_they_are(value) -> None:
    clean = redacted_values(value)
    assert json.loads(redacted(json.dumps(value))) == clean
    assert "hf_x" not in repr(clean)
    assert "hf_y" not in repr(clean)


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.sampled_from(["password", "PASSPHRASE", "wandb_api_key", "hf_token", "client-secret"]),
    NUMBERS,
    st.none() | st.just(1),
)
def test_numbers_under_the_name_of_a_secret_stay(name: str, number: float, indent: int | None) -> None:
    """No text of JSON becomes something that is not JSON."""
    for value in ({name: number}, [{"a": 1, name: number, "b": ""}], {name: {"x": number}}):
        assert redacted_values(value) == value
        assert json.loads(redacted(json.dumps(value, indent=indent))) == value


@given(
    drawn(ALPHANUMERIC, 10, 40),
    st.sampled_from(["wandb_api_key", "HF_TOKEN", "dbPassword", "client_secret", "passphrase"]),
)
def test_texts_under_the_name_of_a_secret_do_not_pass(secret: str, name: str) -> None:
    value = {"a": [{name: secret}]}
    assert redacted_values(value) == {"a": [{name: MARK}]}
    assert json.loads(redacted(json.dumps(value))) == {"a": [{name: MARK}]}
    assert secret not in redacted(f"{name}={secret} {name}: {secret}")


HARMLESS = (
    "TOKENIZERS_PARALLELISM=false; pad_token='<|endoftext|>', eos_token: </s>, max_new_tokens=1024, image_token=32000",
    "task-descriptions-of-the-model-are-long, risk-averse, sklearn, disk-usage-of-every-single-folder",
    "http://localhost:8080/a@b, see https://host/x:y@z, mail me@host.org, file:///tmp/a:b",
    "a bearer of responsibilities-and-duties; authorization: required for this; the password: required",
    "model_args: pretrained=llava-hf/llava-1.5-7b-hf,schedule=dart@2:0.44,random@20:0.07",
    "commit baf4daa0123456789abcdef0123456789abcdef01, sha256:" + HEX * 4,
)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_secret_passes(text: str) -> None:
    assert redacted(text) == text


def test_this_packages_own_text_has_none() -> None:
    """Two megabytes of code and prose about tokens, keys and attention."""
    root = Path(__file__).parents[1]
    files = [
        *root.glob("lmms_prune/**/*.py"),
        *root.glob("docs/*.md"),
        *root.glob("*_configs/*.yaml"),
        root / "README.md",
    ]
    assert len(files) > 200
    changed = [path for path in files if redacted(text := path.read_text(encoding="utf-8")) != text]
    assert changed == []


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PGPASSWD")),
        *(
            (name, True)
            for name in ("GITHUBTOKEN", "MY_CREDENTIALS", "BASIC_AUTH", "client_secret", "TOKEN_2", "DB_PWD")
        ),
        *((name, False) for name in ("TOKENIZERS_PARALLELISM", "GIT_AUTHOR_NAME", "HF_TOKEN_PATH", "SSH_AUTH_SOCK")),
        *((name, False) for name in ("PWD", "HOME", "OMP_NUM_THREADS", "XAUTHORITY", "MONKEYS", "KEYBOARD")),
    ],
)
def test_names_tell_which_variables_are_secret(name: str, secret: bool) -> None:
    assert ("correct horse" in secret_values({name: "correct horse"})) is secret


def test_short_values_and_places_are_no_secrets(tmp_path: Path) -> None:
    given = {"A_TOKEN": "1234567", "B_TOKEN": "true", "C_CREDENTIALS": str(tmp_path), "D_TOKEN": ""}
    assert secret_values(given) == ()


def test_each_line_of_a_key_is_secret() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----\n"
    printed_later = [f"line {line}\n" for line in key.splitlines()]
    clean = "".join(redacted_lines([text.encode() for text in printed_later], secret_values({"SSH_KEY": key})))
    assert clean == f"line {MARK}\n" * 4


# -- streams -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(AROUND, IN_TEXT), min_size=1, max_size=5), st.lists(st.integers(0, 2000)))
def test_however_a_stream_is_cut_no_secret_passes(parts: list, cuts: list[int]) -> None:
    """Also inside of a letter's bytes."""
    text = "".join(f"{before} {secret[0]} \n" for before, secret in parts)
    stream = text.encode("utf-8", "replace")
    bounds = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(bounds)]
    lines = list(redacted_lines(chunks))
    assert lines == list(redacted_lines([stream]))
    clean = "".join(lines)
    assert not [hidden for _, (_, hidden) in parts if hidden in clean]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(60_000, 90_000),
    st.sampled_from(["x", "ab-", "word ", "ß"]),
    st.sampled_from([7, 100, 4096, 65_536]),
    st.booleans(),
)
def test_a_line_without_end_comes_in_parts_and_cuts_no_secret(at: int, filler: str, size: int, by_form: bool) -> None:
    secret = "sk-" + "aB3-" * 60 if by_form else "correct horse battery " * 50
    before, after = ((filler * 200_000)[:length] for length in (at, 80_000))
    stream = f"{before} {secret} {after}".encode()
    secrets = secret_values({} if by_form else {"MY_PASSWORD": secret})
    parts = list(redacted_lines((stream[i : i + size] for i in range(0, len(stream), size)), secrets))
    assert len(parts) > 1
    assert max(map(len, parts)) < 150_000
    assert "".join(parts).replace(" ", "") == f"{before}{MARK}{after}".replace(" ", "")


def test_progress_comes_as_it_is_printed() -> None:
    """A bar's carriage return ends a line as well, and nothing complete waits for what comes next."""
    lines = redacted_lines(iter([b" 10%\r 2", b"0%\r", b"done"]))
    assert [next(lines) for _ in range(3)] == [" 10%\r", " 20%\r", "done"]


DYING = """
import os, signal, subprocess, sys, time
secret = os.environ["MY_TOKEN"]
print("starts with", secret, flush=True)
subprocess.run([sys.executable, "-c", "import os; print('a child says', os.environ['MY_TOKEN'])"], check=True)
for half in (secret[:9], secret[9:], "\\n"):
    os.write(2, half.encode())
    time.sleep(0.05)
os.write(1, b"ends with " + secret.encode())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_amid_a_line_leaves_all_it_printed_but_secrets(tmp_path: Path) -> None:
    secret = "correct horse battery staple"
    environment = {**os.environ, "MY_TOKEN": secret}
    log = tmp_path / "log.txt"
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with (
        subprocess.Popen([sys.executable, "-c", DYING], env=environment, stdout=pipe, stderr=both) as process,
        log.open("w", encoding="utf-8") as file,
    ):
        for line in redacted_lines(printed(process), secret_values(environment)):
            file.write(line)
            file.flush()
            assert secret not in log.read_text(encoding="utf-8")
    assert process.returncode == -signal.SIGKILL
    assert log.read_text(encoding="utf-8").splitlines() == [
        f"starts with {MARK}",
        f"a child says {MARK}",
        MARK,
        f"ends with {MARK}",
    ]


def test_what_a_process_leaves_behind_is_not_waited_for() -> None:
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        (line,) = redacted_lines(printed(process))
    os.kill(int(re.fullmatch(r"(\d+)\n", line)[1]), signal.SIGKILL)  # which is there, so it was not waited for
