"""Tests of episodes, the readers' round trips, and training windows."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from dprl.data.episodes import Episodes, check
from dprl.data.readers import d4rl, zarr
from dprl.data.sequence_dataset import EpochSampler, Prefetcher, SequenceDataset
from dprl.utils.errors import UserError


def episodes(*lengths: int, **changes) -> Episodes:
    """Return episodes whose actions and first observations are 10 episode + step."""
    steps = torch.cat([10.0 * e + torch.arange(n) for e, n in enumerate(lengths)])
    ends = torch.tensor(lengths).cumsum(0)
    values = dict(
        obs=torch.stack([steps, steps + 0.5], -1),
        act=steps[:, None],
        rew=steps,
        ends=ends,
        terminated=torch.arange(len(lengths)) % 2 == 0,
        last_obs=torch.full((len(lengths), 2), -1.0),
        source="test",
    )
    return Episodes(**(values | changes))


def test_windows_by_hand():
    windows = SequenceDataset(episodes(3, 1), obs_steps=2, horizon=4, act_steps=2, padding="masked")
    obs, act, mask = windows[torch.arange(4)]
    assert obs[..., 0].tolist() == [[0, 0], [0, 1], [1, 2], [10, 10]]
    assert act[..., 0].tolist() == [[0, 0, 1, 2], [0, 1, 2, 2], [1, 2, 2, 2], [10, 10, 10, 10]]
    assert mask.int().tolist() == [[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]]


def test_repeated_windows_by_hand():
    """To 2, H 4, Ta 2: a window begins at most one step before its episode and ends at most one step after it."""
    windows = SequenceDataset(episodes(3, 1, 2), obs_steps=2, horizon=4, act_steps=2, padding="repeated")
    obs, act, mask = windows[torch.arange(len(windows))]
    assert obs[..., 0].tolist() == [[0, 0], [0, 1], [20, 20]]
    assert act[..., 0].tolist() == [[0, 0, 1, 2], [0, 1, 2, 2], [20, 20, 21, 21]]
    assert bool(mask.all())


def padded(length: int, *, horizon: int, before: int, after: int) -> list[list[int]]:
    """Return the steps of each window of Diffusion Policy's sampler, clamped to the episode."""
    return [
        [min(max(s, 0), length - 1) for s in range(a, a + horizon)]
        for a in range(-before, length - horizon + after + 1)
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    obs_steps=st.integers(1, 3),
    act_steps=st.integers(1, 8),
    more=st.integers(0, 8),
)
def test_repeated_windows_are_those_of_diffusion_policy(lengths, obs_steps, act_steps, more):
    horizon = obs_steps - 1 + act_steps + more
    settings = dict(horizon=horizon, before=obs_steps - 1, after=act_steps - 1)
    expected = [[10 * e + s for s in steps] for e, length in enumerate(lengths) for steps in padded(length, **settings)]
    data = episodes(*lengths)
    if not expected:
        with pytest.raises(UserError, match=r"leaves no window[\s\S]*train.padding=masked"):
            SequenceDataset(data, obs_steps=obs_steps, horizon=horizon, act_steps=act_steps, padding="repeated")
        return
    windows = SequenceDataset(data, obs_steps=obs_steps, horizon=horizon, act_steps=act_steps, padding="repeated")
    obs, act, mask = windows[torch.arange(len(windows))]
    assert act[..., 0].tolist() == expected
    assert obs[..., 0].tolist() == [steps[:obs_steps] for steps in expected]
    assert bool(mask.all())


def test_windows_keep_their_labels_and_refuse_another_padding():
    data = episodes(4, 2)
    sizes = dict(obs_steps=1, horizon=3, act_steps=1)
    *_, label = SequenceDataset(data, **sizes, padding="repeated", labels=data.rew)[torch.arange(2)]
    assert label.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"train.padding is unknown[\s\S]*masked or repeated"):
        SequenceDataset(data, **sizes, padding="mask")  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), obs_steps=st.integers(1, 4), horizon=st.integers(1, 12)
)
def test_windows_never_leave_their_episode(lengths, obs_steps, horizon):
    data = episodes(*lengths)
    windows = SequenceDataset(data, obs_steps=obs_steps, horizon=horizon, act_steps=1, padding="masked")
    assert len(windows) == sum(lengths)
    obs, act, mask = windows[torch.arange(len(windows))]
    assert obs.shape == (sum(lengths), obs_steps, 2)
    assert act.shape == (sum(lengths), horizon, 1)
    t = 0
    for episode, length in enumerate(lengths):
        for step in range(length):
            assert obs[t, -1, 0] == 10 * episode + step
            for h in range(horizon):
                act_step = step - (obs_steps - 1) + h
                assert bool(mask[t, h]) == (0 <= act_step < length)
                assert act[t, h, 0] == 10 * episode + min(max(act_step, 0), length - 1)
            t += 1


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 50), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_an_epoch_has_each_window_at_most_once_and_the_sampler_needs_no_state(size, batch, seed):
    sampler = EpochSampler(size, batch=batch, seed=seed)
    per_epoch = size // min(batch, size)
    first = torch.cat([sampler(step) for step in range(per_epoch)])
    assert len(first.unique()) == len(first) == per_epoch * min(batch, size)
    later = sampler(3 * per_epoch)
    assert torch.equal(EpochSampler(size, batch=batch, seed=seed)(3 * per_epoch), later)


@given(size=st.integers(1, 200), batch=st.integers(1, 20), max_steps=st.integers(1, 20), step=st.integers(0, 500))
def test_all_steps_of_a_block_have_the_same_block_in_one_epoch(size, batch, max_steps, step):
    sampler = EpochSampler(size, batch=batch, seed=0)
    steps = sampler.block(step, max_steps)
    assert step in steps and 1 <= len(steps) <= max_steps
    assert steps[0] // sampler.batches_per_epoch == steps[-1] // sampler.batches_per_epoch
    assert all(sampler.block(other, max_steps) == steps for other in steps)
    assert steps.stop % sampler.batches_per_epoch == 0 or len(steps) == max_steps


def noised(obs, act, mask, generator):
    """Prepare a batch as a policy does: return the observations, and noise."""
    return obs, torch.randn(act.shape, generator=generator)


@pytest.mark.parametrize("images", [False, True])
def test_the_prefetcher_returns_the_batch_of_each_step(images):
    data = episodes(*[7] * 12)
    if images:  # half a megabyte per batch
        wide = data.obs[:, :, None].repeat(1, 1, 2**15)
        data = replace(data, obs=TensorDict({"image": wide, "at": data.obs}, [84]), last_obs=TensorDict({}, [12]))
    windows = SequenceDataset(data, obs_steps=2, horizon=3, act_steps=2, padding="masked")
    sampler = EpochSampler(84, batch=4, seed=3)
    prefetcher, drawn = Prefetcher(windows, sampler, noised), {}
    for step in (*range(50), 7, 8, 41, 42):  # 21 per epoch
        expected = windows[sampler(step)]
        parts, (obs, noise) = prefetcher(step)
        for value, expected_value in zip((*parts, obs), (*expected, expected[0]), strict=True):
            assert len(value) == 4 and (value == expected_value).all()
        assert torch.equal(drawn.setdefault(step, noise), noise)
    assert prefetcher.block_size == (1 if images else prefetcher.MAX_STEPS)
    assert len(torch.cat([noise.flatten() for noise in drawn.values()]).unique()) == 50 * 4 * 3
    for step in (5, 17, 33):  # like a run that is resumed there
        assert torch.equal(Prefetcher(windows, sampler, noised)(step)[1][1], drawn[step])
    other = Prefetcher(windows, EpochSampler(84, batch=4, seed=4), noised)
    assert not torch.isin(other(5)[1][1], drawn[5]).any()
    state = torch.get_rng_state()
    other(40)
    assert torch.equal(torch.get_rng_state(), state)


def test_split_does_not_divide_episodes():
    data = episodes(3, 1, 4, 2, 5)
    train, validation = data.split(0.4, seed=0)
    assert validation is not None
    assert sorted(train.lengths.tolist() + validation.lengths.tolist()) == [1, 2, 3, 4, 5]
    for part in (train, validation):
        for start, end in zip(part.starts, part.ends, strict=True):
            assert len(set((part.act[start:end, 0] // 10).tolist())) == 1
    assert episodes(3).split(0.9, seed=0)[1] is None
    with pytest.raises(UserError, match=r"train.validation"):
        data.split(1.0, seed=0)


def test_returns():
    assert episodes(3, 2).returns.tolist() == [3.0, 21.0]
    with pytest.raises(UserError, match="no rewards"):
        _ = episodes(3, rew=None).returns


def test_d4rl_round_trip(tmp_path):
    data = episodes(3, 1, 4)
    d4rl.save(tmp_path / "a.hdf5", data)
    back = d4rl.load(tmp_path / "a.hdf5")
    for name in ("obs", "act", "rew", "ends", "terminated", "last_obs"):
        assert torch.equal(getattr(back, name), getattr(data, name)), name
    assert not list(tmp_path.glob("*.partial"))


@st.composite
def any_episodes(draw) -> Episodes:
    """Draw valid episodes of any lengths, sizes and finite numbers, with or without rewards and last observations."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    steps, count = sum(lengths), len(lengths)
    sizes = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)

    def array(*shape: int) -> torch.Tensor:
        few = draw(st.lists(number, min_size=1, max_size=8))
        return torch.tensor(few).repeat(int(np.prod(shape)))[: int(np.prod(shape))].reshape(shape)

    return Episodes(
        obs=array(steps, sizes[0]),
        act=array(steps, sizes[1]),
        rew=array(steps) if draw(st.booleans()) else None,
        ends=torch.tensor(lengths).cumsum(0),
        terminated=torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        last_obs=array(count, sizes[0]) if draw(st.booleans()) else None,
        source="test",
    )


def same(one: Episodes, other: Episodes, *names: str) -> None:
    for name in names:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(a, b), name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=any_episodes())
def test_any_episodes_come_back_from_hdf5(tmp_path, data):
    d4rl.save(tmp_path / "a.hdf5", data)
    same(d4rl.load(tmp_path / "a.hdf5"), data, "obs", "act", "rew", "ends", "terminated", "last_obs")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=any_episodes(), rows=st.integers(1, 9), codec=st.sampled_from(["zstd", "blosc", "gzip", "none"]))
def test_any_episodes_come_back_from_zarr(tmp_path, data, rows, codec):
    library, numcodecs = pytest.importorskip("zarr"), pytest.importorskip("numcodecs")

    group = library.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    arrays = {"data/state": data.obs, "data/action": data.act, "meta/episode_ends": data.ends}
    if data.rew is not None:
        arrays["data/reward"] = data.rew
    for name, value in arrays.items():
        array = group.create_array(
            name,
            shape=value.shape,
            dtype=value.numpy().dtype,
            chunks=(rows, *value.shape[1:]),
            config={"write_empty_chunks": True},
            compressors=None if codec == "none" else numcodecs.get_codec({"id": codec}),
        )
        array[...] = value.numpy()
    back = zarr.load(tmp_path / "a.zarr", observe="state", hint="", limit_gib=1.0)
    same(back, data, "obs", "act", "rew", "ends")


def write(path, steps=6, **arrays):
    values = dict(
        observations=np.zeros((steps, 2)),
        actions=np.zeros((steps, 1)),
        rewards=np.zeros(steps),
        terminals=np.zeros(steps),
        timeouts=np.zeros(steps),
    )
    with h5py.File(path, "w") as file:
        for key, value in (values | arrays).items():
            if value is not None:
                file[key] = value
    return path


def test_terminals_and_timeouts_are_distinguished_and_a_v0_file_is_read(tmp_path):
    path = write(tmp_path / "v0.hdf5", terminals=np.array([0, 1, 0, 0, 0, 0]), timeouts=np.array([0, 0, 0, 1, 0, 0]))
    data = d4rl.load(path)
    assert data.ends.tolist() == [2, 4, 6]  # the end of the file ends the last episode
    assert data.terminated.tolist() == [True, False, False]
    assert data.last_obs is None


BAD = {
    "nan": (dict(observations=np.full((6, 2), np.nan)), "'observations' has 12 values that are not finite"),
    "inf action": (dict(actions=np.array([[0.0]] * 4 + [[np.inf]] * 2)), "first at step 4"),
    "no actions": (dict(actions=None), "lacks 'actions'"),
    "other length": (dict(rewards=np.zeros(5)), "'rewards' has another length"),
    "scalar actions": (dict(actions=np.zeros(6)), "'actions' has the wrong shape"),
    "text": (dict(actions=np.array([b"a"] * 6)), "not an array of numbers"),
    "empty": (
        dict(observations=np.zeros((0, 2)), actions=np.zeros((0, 1)), rewards=None, terminals=None, timeouts=None),
        "holds no data",
    ),
    "endless": (dict(terminals=None, timeouts=None), "does not mark the ends of episodes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named(tmp_path, name):
    arrays, message = BAD[name]
    path = write(tmp_path / "bad.hdf5", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        d4rl.load(path)
    assert "bad.hdf5" in str(caught.value)


def test_a_missing_file_and_a_truncated_file(tmp_path):
    with pytest.raises(UserError, match="nothing at"):
        d4rl.load(tmp_path / "none.hdf5")
    (tmp_path / "text.hdf5").write_text("not HDF5")
    with pytest.raises(UserError, match="cannot be read"):
        d4rl.load(tmp_path / "text.hdf5")
    whole = write(tmp_path / "whole.hdf5", steps=5000).read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        d4rl.load(tmp_path / "cut.hdf5")


def image_episodes(*lengths: int) -> Episodes:
    """Return `episodes` with dictionary observations, whose images have the step as the value of every pixel."""
    plain = episodes(*lengths)
    steps = plain.act[:, 0]
    image = steps.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 5).clone()
    return replace(plain, obs=TensorDict(image=image, place=plain.obs, batch_size=[len(steps)]), last_obs=None)


def test_images_are_windowed_selected_and_split_like_vectors():
    data = check(image_episodes(3, 1, 4))
    assert data.obs_shape == {"image": [3, 4, 5], "place": [2]}
    obs, *_ = SequenceDataset(data, obs_steps=2, horizon=4, act_steps=2, padding="masked")[torch.arange(8)]
    assert obs["image"].shape == (8, 2, 3, 4, 5) and obs["image"].dtype == torch.uint8
    torch.testing.assert_close(obs["image"][..., 0, 0, 0].float(), obs["place"][..., 0])
    part = data.select(torch.tensor([0, 2]))
    assert part.obs["image"][:, 2, 3, 4].tolist() == [0, 1, 2, 20, 21, 22, 23]
    train, validation = data.split(0.4, seed=0)
    assert validation is not None
    images = torch.cat([train.obs["image"], validation.obs["image"]])
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 1, 2, 10, 20, 21, 22, 23]


def test_check_covers_dictionary_observations():
    data = image_episodes(3, 2)
    data.obs["place"][4] = float("nan")
    with pytest.raises(UserError, match=r"'place' has 2 values[\s\S]*step 4 \(episode 1\)"):
        check(data)
    short = replace(image_episodes(3), act=torch.zeros(2, 1))
    with pytest.raises(UserError, match=r"'image' has another length"):
        check(short)


def test_check_names_the_episode():
    data = episodes(3, 2)
    data.act[4] = float("nan")
    with pytest.raises(UserError, match=r"step 4 \(episode 1\)"):
        check(data)
