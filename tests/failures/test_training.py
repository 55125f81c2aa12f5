"""Trainings and checkpoints that users get wrong, and what they are told."""

from __future__ import annotations

class Network(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 2 * width), nn.Linear(width, 3)
        self.width = width

    def model(self, x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.width), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("sequences", len(x)):
            loc, scale = self.encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp(), validate_args=False).to_event(1))


def train(folder, network, *, num_steps=3, resume=True, bad=None, **options):
    def draw(generator):
        batch = torch.randn(4, 3, generator=generator)
        return batch if bad is None else batch * bad

    module = training.ELBOTraining(
        network, network.model, network.guide, draw, num_steps=num_steps,
        learning_rate=AnnealingSchedule.constant(1e-3), arguments=lambda batch: (batch,),
    )  # fmt: skip
    training.fit(module, folder, resume=resume, progress_bar=False, accelerator="cpu", **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder, Network())
    return (folder / "last.ckpt").read_bytes()


def half_frozen():
    network = Network()
    network.encode.requires_grad_(False)
    return network


def lacking_a_layer():
    network = Network()
    network.deeper = nn.Linear(1, 1)
    return network


def put(path, content):
    path.write_bytes(content)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


KEPT = "put a whole copy in its place, or remove it to train from the start"


@rows(
    ("half of it", lambda path, whole: put(path, whole[: len(whole) // 2]), training.CheckpointError,
     rf"last.ckpt: cannot be read as a checkpoint \(.*\); {KEPT}"),
    ("all but its last bytes", lambda path, whole: put(path, whole[:-1]), training.CheckpointError, "cannot be read"),
    ("a byte of a weight changed", lambda path, whole: put(path, flipped(whole)), training.CheckpointError,
     "cannot be read as a checkpoint .*data/[0-9]+ does not fit its checksum"),
    ("nothing", lambda path, _: put(path, b""), training.CheckpointError, "cannot be read"),
    ("garbage", lambda path, _: put(path, b"\x00\x01 garbage" * 99), training.CheckpointError, "cannot be read"),
    ("text", lambda path, _: put(path, b"loss,step\n1.0,3\n"), training.CheckpointError, "cannot be read"),
    ("a pickle that would run code", lambda path, _: torch.save({"state_dict": Harmful()}, path),
     training.CheckpointError, "cannot be read as a checkpoint .it holds more than tensors"),
    ("bare weights", lambda path, _: torch.save(Network().state_dict(), path), training.CheckpointError,
     r"is no checkpoint of seqdisent.training, it lacks \['state_dict', .*; " + KEPT),
    ("another program's", lambda path, _: torch.save([1, 2], path), training.CheckpointError, "is no checkpoint of"),
)  # fmt: skip
def test_checkpoints_that_cannot_be_read(row, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row.do(tmp_path / "last.ckpt", checkpoint)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(row.error, match=row.said) as raised:
        train(tmp_path, Network(), num_steps=5)
    assert str(tmp_path / "last.ckpt") in str(raised.value)
    assert (tmp_path / "last.ckpt").read_bytes() == before  # what is refused is not overwritten either
    assert not (tmp_path / "harmed").exists()


def flipped(whole):
    weights = torch.load(io.BytesIO(whole), weights_only=True)["state_dict"]["network.encode.weight"]
    at = whole.index(weights.numpy().tobytes()) + 1
    return whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]


@rows(
    ("of a network with other sizes", lambda: Network(width=5), training.CheckpointError,
     r"is the checkpoint of another network: it has network.encode.weight of shape \(4, 3\), expected \(10, 3\) "
     r"\(and 2 more differences\)"),
    ("of a network with fewer layers", lacking_a_layer, training.CheckpointError,
     "is the checkpoint of another network: it lacks network.deeper.weight .and 1 more"),
    ("of another stage", half_frozen, training.CheckpointError,
     "was written where other parameters were trained, encode.bias in one case alone .2 in all"),
)  # fmt: skip
def test_checkpoints_of_another_run(row, checkpoint, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(checkpoint)
    with pytest.raises(row.error, match=row.said):
        train(tmp_path, row.do(), num_steps=5)
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint


@rows(
    ("a run that is there, and no resume", lambda folder: train(folder, Network(), resume=False), FileExistsError,
     "folder: .*last.ckpt exists; resume that run, or choose another folder"),
    ("no step between checkpoints", lambda folder: train(folder, Network(), checkpoint_every=0), ValueError,
     "checkpoint_every: got 0, expected an integer >= 1"),
    ("NaN in a batch", lambda folder: train(folder, Network(), num_steps=5, bad=torch.nan), FloatingPointError,
     r"log_likelihood\['x'\] is nan at training step 3 \(sequence 0\)"),
)  # fmt: skip
def test_training(row, checkpoint, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(checkpoint)
    check(row, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint
