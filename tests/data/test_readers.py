"""Tests of the D4RL and Minari readers, of downloads, and of the inspection of data."""

import http.server
import threading
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

from dprl.cli.inspect import facts
from dprl.data.episodes import Episodes
from dprl.data.readers import d4rl, minari
from dprl.data.readers.download import fetch
from dprl.data.relabel import longer_than_the_limit
from dprl.utils.errors import UserError
from tests.data.test_sequence_dataset import episodes
from tests.helpers.small import vec


def same(a: Episodes, b: Episodes) -> None:
    for name in ("obs", "act", "rew", "ends", "terminated", "last_obs"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_bare_name_is_looked_up_in_the_d4rl_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    d4rl.save(tmp_path / "hopper_medium-v2.hdf5", episodes(3, 2))
    monkeypatch.chdir(tmp_path.parent)
    same(d4rl.load("hopper_medium-v2"), episodes(3, 2))
    same(d4rl.load("hopper_medium-v2.hdf5"), episodes(3, 2))
    with pytest.raises(UserError, match=r"nothing at other\.hdf5 nor at "):
        d4rl.load("other.hdf5")
    with pytest.raises(UserError, match=r"nothing at elsewhere/hopper_medium-v2\.hdf5"):
        d4rl.load("elsewhere/hopper_medium-v2.hdf5")


def test_the_d4rl_folder_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    d4rl.save(tmp_path / ".d4rl/datasets/mine.hdf5", episodes(3))
    assert len(d4rl.load("mine")) == 1


@pytest.mark.parametrize("value", [0.5, np.nan, 2.0])
def test_a_flag_that_is_neither_true_nor_false_is_refused(tmp_path, value):
    d4rl.save(tmp_path / "data.hdf5", episodes(3, 2))
    with h5py.File(tmp_path / "data.hdf5", "a") as file:
        flags = file["terminals"][()].astype(float)
        flags[1] = value
        del file["terminals"]
        file["terminals"] = flags
    with pytest.raises(UserError, match=rf"'terminals' is neither true nor false\n.*0 or 1\n.*{value}"):
        d4rl.load(tmp_path / "data.hdf5")


def test_a_file_without_time_limits_is_cut_at_one(tmp_path):
    d4rl.save(tmp_path / "data.hdf5", episodes(6, 2, 4))
    with h5py.File(tmp_path / "data.hdf5", "a") as file:
        del file["timeouts"]
        file["terminals"][...] = False
        file["terminals"][7] = True
    assert d4rl.load(tmp_path / "data.hdf5").lengths.tolist() == [8, 4]
    cut = d4rl.load(tmp_path / "data.hdf5", max_episode_steps=3)
    assert cut.lengths.tolist() == [3, 3, 2, 3, 1]
    assert cut.terminated.tolist() == [False, False, True, False, False]


def test_an_episode_beyond_the_task_s_time_limit_is_reported():
    envs = vec("Aim-v0", num_envs=1)  # a limit of 10 steps
    assert longer_than_the_limit(envs, episodes(10, 2)) is None
    error = longer_than_the_limit(envs, episodes(3, 11))
    assert error is not None and "at most 10 steps" in str(error) and "found:    11 steps" in str(error)
    assert "data.max_episode_steps=10" in str(error)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("hopper_medium-v2.hdf5", "gym_mujoco_v2/hopper_medium-v2.hdf5"),
        ("halfcheetah_medium_replay-v1.hdf5", "gym_mujoco_v1/halfcheetah_medium_replay-v1.hdf5"),
        ("walker2d_medium_expert-v0.hdf5", "gym_mujoco/walker2d_medium_expert.hdf5"),
        ("mine.hdf5", None),
    ],
)
def test_published_addresses(name, address):
    got = d4rl.published(name)
    assert got is None if address is None else got.endswith("/" + address)


class Server:
    """A server of `content` that records the requested ranges. With `cut`, its first response has that many bytes."""

    def __init__(self, content: bytes, *, cut: int | None = None, ranges: bool = True):
        self.requested: list[str | None] = []
        self.content = content
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                begin, content = 0, outer.content
                tag = f'"{hash(content)}"'
                requested = self.headers.get("Range")
                outer.requested.append(requested)
                if self.path != "/file.hdf5":
                    self.send_error(404)
                    return
                if requested and ranges and self.headers.get("If-Range") == tag:
                    begin = int(requested.removeprefix("bytes=").removesuffix("-"))
                    self.send_response(206)
                else:
                    self.send_response(200)
                rest = content[begin:]
                self.send_header("Content-Length", str(len(rest)))
                self.send_header("ETag", tag)
                self.end_headers()
                self.wfile.write(rest[:cut] if cut and len(outer.requested) == 1 else rest)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/file.hdf5"


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "server without ranges"])
def test_an_interrupted_download_is_resumed(tmp_path, ranges):
    content = np.random.default_rng(0).bytes(300_000)
    server, path = Server(content, cut=100_000, ranges=ranges), tmp_path / "file.hdf5"
    with pytest.raises(UserError, match=r"incomplete|cannot be downloaded"):
        fetch(server.url, path)
    assert not path.exists()
    fetch(server.url, path)
    assert path.read_bytes() == content
    assert server.requested == [None, "bytes=100000-"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_changed_is_downloaded_again(tmp_path):
    rng = np.random.default_rng(0)
    server, path = Server(rng.bytes(300_000), cut=100_000), tmp_path / "file.hdf5"
    with pytest.raises(UserError):
        fetch(server.url, path)
    server.content = rng.bytes(250_000)
    fetch(server.url, path)
    assert path.read_bytes() == server.content


def test_a_download_from_another_address_is_not_resumed(tmp_path):
    rng = np.random.default_rng(0)
    first, second, path = Server(rng.bytes(300_000), cut=100_000), Server(rng.bytes(200_000)), tmp_path / "file.hdf5"
    with pytest.raises(UserError):
        fetch(first.url, path)
    fetch(second.url, path)
    assert path.read_bytes() == second.content
    assert second.requested == [None]


def test_a_complete_download_is_only_renamed(tmp_path):
    server, path = Server(np.random.default_rng(0).bytes(3000)), tmp_path / "file.hdf5"
    (tmp_path / "file.hdf5.partial").write_bytes(server.content)
    (tmp_path / "file.hdf5.partial.json").write_text(f'{{"url": "{server.url}", "tag": "x", "size": 3000}}')
    fetch(server.url, path)
    assert path.read_bytes() == server.content
    assert server.requested == []


def test_download_only_when_requested(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    d4rl.save("source.hdf5", episodes(3, 2))
    server = Server(Path("source.hdf5").read_bytes())
    with pytest.raises(UserError, match="no data file"):
        d4rl.load("new", url=server.url)
    assert server.requested == []
    same(d4rl.load("new", url=server.url, download=True), episodes(3, 2))
    assert (tmp_path / "cache/new.hdf5").is_file()
    d4rl.load("new", url=server.url, download=True)
    assert len(server.requested) == 1
    with pytest.raises(UserError, match=r"answered 404"):
        d4rl.load("gone", url=server.url.replace("file", "none"), download=True)
    with pytest.raises(UserError, match=r"the address of unheard\.hdf5 is unknown"):
        d4rl.load("unheard", download=True)


def test_a_missing_network_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot be downloaded[\s\S]*connect to the network"):
        fetch("http://127.0.0.1:9/file.hdf5", tmp_path / "file.hdf5")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Return a function that writes a Minari dataset of two episodes of Counter-v0 with the library."""
    import minari as library
    from minari.data_collector.episode_buffer import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def make(name="test/counter/mixed-v0", *, env="Counter-v0", observations=None, space=None):
        buffers = []
        for length, terminated in ((4, True), (3, False)):
            obs = np.arange(2 * (length + 1), dtype=np.float64).reshape(-1, 2)
            flags = np.arange(length) == length - 1
            buffers.append(
                EpisodeBuffer(
                    observations=obs if observations is None else observations(obs),
                    actions=np.linspace(-1, 1, length, dtype=np.float32)[:, None],
                    rewards=list(np.arange(length, dtype=float)),
                    terminations=list(flags & terminated),
                    truncations=list(flags & (not terminated)),
                )
            )
        library.create_dataset_from_buffers(name, buffers, env=gym.make(env), observation_space=space)
        return name

    return make


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")  # about missing authors and descriptions
SETTINGS = dict(id=None, path=None, download=False, env_id="Counter-v0", keys=None, limit_gib=1.0)


def test_minari_by_id_and_by_folder(recorded, tmp_path):
    name = recorded()
    data = minari.load(**SETTINGS | dict(id=name))
    assert data.lengths.tolist() == [4, 3]
    assert data.obs[:, 0].tolist() == [0, 2, 4, 6, 0, 2, 4]
    assert data.last_obs[:, 0].tolist() == [8, 6]
    assert data.rew.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert data.terminated.tolist() == [True, False]
    folder = tmp_path / "minari" / name
    same(data, minari.load(**SETTINGS | dict(path=str(folder))))
    same(data, minari.load(**SETTINGS | dict(path=str(folder / "data"))))


def test_minari_of_dictionaries_takes_keys_in_order(recorded):
    box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    space = gym.spaces.Dict({"a": box, "b": box})
    name = recorded(observations=lambda obs: {"a": obs, "b": -obs}, space=space)
    data = minari.load(**SETTINGS | dict(id=name, keys=["b", "a"]))
    assert data.obs[1].tolist() == [-2, -3, 2, 3]
    with pytest.raises(UserError, match=r"has dictionary observations[\s\S]*\['a', 'b'\]"):
        minari.load(**SETTINGS | dict(id=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(env_id="Hopper-v5"),
            r"recorded in another environment[\s\S]*Hopper-v5[\s\S]*Counter-v0[\s\S]*data.env_id=null",
        ),
        (dict(id="test/none-v0"), r"is not on this machine[\s\S]*data.download=true"),
        (dict(id="no such name!"), r"is not on this machine"),
        (dict(id=None), r"one Minari dataset must be given"),
        (dict(id=None, path="nowhere"), r"no Minari dataset"),
    ],
    ids=str,
)
def test_minari_names_the_problem(recorded, changes, message):
    name = recorded()
    with pytest.raises(UserError, match=message):
        minari.load(**SETTINGS | dict(id=name) | changes)


def test_minari_names_a_missing_network(monkeypatch, tmp_path):
    import minari as library

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def unreachable(*arguments, **options):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(library, "download_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"cannot be downloaded: ConnectionError[\s\S]*connect to the network[\s\S]*data.path="
    ):
        minari.load(**SETTINGS | dict(id="mujoco/hopper/medium-v0", download=True))


def test_minari_files_that_are_broken(recorded, tmp_path):
    name = recorded()
    file = tmp_path / "minari" / name / "data/main_data.hdf5"
    with h5py.File(file, "a") as opened:
        opened["episode_1/rewards"][...] = np.nan
    with pytest.raises(UserError, match=r"'rewards' has 3 values that are not finite"):
        minari.load(**SETTINGS | dict(id=name))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"cannot be (read|opened)"):
        minari.load(**SETTINGS | dict(id=name))


def test_minari_accepts_any_environment_if_env_id_is_none(recorded):
    assert len(minari.load(**SETTINGS | dict(id=recorded(), env_id=None))) == 2


def test_facts_name_unusual_data():
    logged = episodes(3, 2, act=torch.tensor([[0.0, 5.0], [0.5, 5.0], [3.0, 5.0], [0.0, 5.0], [0.0, 5.0]]))
    from omegaconf import OmegaConf

    reference = OmegaConf.create({"random": 0.0, "expert": 24.0})
    lines = dict(facts(logged, torch.tensor([-1.0, -9.0]), torch.tensor([1.0, 9.0]), reference))
    assert lines["ends"].startswith("1 terminations, 1 truncations")
    assert lines["returns"].startswith("12 +- 9, 3 to 21")
    assert lines["D4RL-normalised"] == "50.0"
    assert "OUT OF RANGE" in lines["action 0"] and "CONSTANT" not in lines["action 0"]
    assert "CONSTANT" in lines["action 1"] and "OUT OF RANGE" not in lines["action 1"]
    assert dict(facts(episodes(3, rew=None), torch.zeros(1), torch.ones(1), None))["rewards"] == "none"
