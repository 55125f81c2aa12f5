"""Data that users get wrong, and what they are told."""

from __future__ import annotations

def bytes_of(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


def some_clips(**options):
    return Clips(bytes_of(3, 2, 1, 4, 4), **options)


def picture_folder(folder, *files, content=b"no picture"):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


def npz(folder, **arrays):
    np.savez(folder / "clips.npz", **arrays)
    return folder / "clips.npz"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-50])
    return path


def wrong_sheets(folder):
    from seqdisent.datasets._sheets import SHEETS

    return picture_folder(folder, *SHEETS)


@rows(
    ("float frames in a data set of bytes", lambda _: Clips(torch.rand(3, 2, 1, 4, 4)), TypeError,
     r"frames: got torch.float32 of shape .*, expected a tensor of uint8 \(pixels 0 to 255\)"),
    ("a clip longer than its frames", lambda _: some_clips(lengths=torch.tensor([1, 2, 3])), ValueError,
     "lengths: got values from 1 to 3, expected 1 to 2"),
    ("a clip of no frame", lambda _: some_clips(lengths=torch.tensor([0, 2, 2])), ValueError, "lengths: got values fr"),
    ("identities of some clips alone", lambda _: some_clips(identity=torch.tensor([0, 1])), ValueError,
     r"identity: shape is \(2,\), expected \(3,\), one value per clip"),
    ("a static factor that changes within an identity", lambda _: some_clips(
        identity=torch.tensor([0, 0, 1]), labels={"hair": torch.tensor([0, 1, 0])}, static_factors=["hair"]),
     ValueError, "static_factors: 'hair' differs between clips of one identity"),
    ("a clip that is not there", lambda _: some_clips().batch([3]), ValueError, "indices: got positions from 3 to 3"),
    ("too few identities for a split", lambda _: some_clips(identity=torch.zeros(3).long()).split(
        0.5, 0, by="identity"), ValueError, "split by identity: there is 1, expected at least 2"),
    ("a split that leaves nothing to train on", lambda _: some_clips().split(3, 0, by="identity"), ValueError,
     "held_out: got 3 of 3 by identity, expected at most 2"),
    ("too few identities for a swap's donors", lambda _: pick_donors(torch.zeros(3).long(), None, seed=0), ValueError,
     "identity: all clips show the same one"),
    ("a true swap of data that knows none", lambda _: some_clips().true_swap(0, 1), ValueError, "have no renderer"),
    # files
    ("a folder that is not there", lambda folder: load_clips(folder / "no"), FileNotFoundError, "no: no such folder"),
    ("an empty folder", lambda folder: load_clips(folder), ValueError, "no clip in this folder; expected the layout"),
    ("a clip without frames", lambda folder: (folder / "anna" / "smile").mkdir(parents=True) or load_clips(folder),
     ValueError, "anna/smile: an empty clip; add frames or remove the folder"),
    ("pictures in the wrong layout", lambda folder: load_clips(picture_folder(folder, "frame0.png")), ValueError,
     "frame0.png: a file where an identity's folder belongs"),
    ("a file that is no picture", lambda folder: load_clips(picture_folder(folder, "anna/smile/notes.txt")), ValueError,
     "notes.txt: not a picture that Pillow can read; remove it or convert it to PNG"),
    ("one identity alone", lambda folder: load_clips(npz(folder, frames=np.zeros((2, 3, 8, 8), np.uint8),
     identity=np.zeros(2, int)), image_size=8), ValueError, "all clips show one identity, expected at least 2"),
    ("an archive without frames", lambda folder: load_clips(npz(folder, video=np.zeros(3))), ValueError,
     r"clips.npz: holds \['video'\], expected an array 'frames'"),
    ("an archive of float frames", lambda folder: load_clips(npz(folder, frames=np.zeros((2, 3, 8, 8)))), TypeError,
     "array 'frames' is float64, expected uint8 .pixels 0 to 255"),
    ("an archive that was cut off", lambda folder: load_clips(cut_off(npz(folder, frames=np.zeros(
        (2, 3, 8, 8), np.uint8)))), ValueError, "clips.npz: not a NumPy file that can be read"),
    ("an archive with objects, which could run code", lambda folder: load_frames(npz(folder, frames=np.array(
        [{}], object))), ValueError, "arrays of objects are refused"),
    ("sprite sheets of another version", lambda folder: sprites(wrong_sheets(folder)), ValueError,
     "SHA-256 is .*, expected .*; delete it and fetch it again"),
    ("sprite sheets that are not there", lambda folder: sprites(folder), FileNotFoundError,
     r"sprite sheets: in none of: .*sprites\(download=True\)"),
    ("a character that does not exist", lambda _: sprites(characters=[840]), ValueError, "characters: got .840."),
)  # fmt: skip
def test_data(row, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQDISENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQDISENT_DATA", raising=False)
    check(row, tmp_path)


def test_a_member_of_an_archive_cannot_leave_its_folder(tmp_path):
    """Archives are read in memory and never unpacked, so a path that climbs out has nowhere to go."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = npz(folder, frames=np.zeros((2, 3, 8, 8), np.uint8), label=np.arange(2))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("frames.npy", members["frames.npy"])
        archive.writestr("../escaped.npy", members["label.npy"])
    assert len(load_clips(path, image_size=8)) == 2
    assert [found.name for found in tmp_path.rglob("*")] == ["data", "clips.npz"]


@pytest.mark.parametrize(
    ("missing", "module", "said"),
    [
        ("lightning", "seqdisent.training", "seqdisent.training needs Lightning; .*seqdisent.train."),
        ("torchmetrics", "seqdisent.metrics.swaps", "seqdisent.metrics.swaps needs .*seqdisent.metrics."),
    ],
)
def test_an_extra_that_is_not_installed(missing, module, said, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=said):
        importlib.import_module(module)
