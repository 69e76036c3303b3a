from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from metafit.data import from_arrays, from_csv, from_folder, from_huggingface, from_parquet, read, table
from metafit.errors import BadInput
from metafit.images import check_image, open_image

TEXTS = 'text,label\nhello there,greet\n"bye, now",leave\n'
NUMBERS = "a,b,label\n1,2.5,x\n3,4e1,y\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(call, *parts: str) -> None:
    """The call fails with one line that has all the parts."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def picture(path: Path, size: tuple[int, int] = (20, 10), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    for name in ("cat", "dog"):
        for i in range(2):
            picture(tmp_path / "pets" / name / f"{i}.png", seed=i)
    return tmp_path / "pets"


def test_csv_of_texts(tmp_path):
    source = from_csv(write(tmp_path / "t.csv", TEXTS), text="text")
    assert (source.name, source.modality) == ("t", "text")
    assert source.x == ["hello there", "bye, now"]
    assert [source.classes[i] for i in source.y] == ["greet", "leave"]


def test_csv_of_numbers(tmp_path):
    source = from_csv(write(tmp_path / "t.csv", NUMBERS))
    assert source.x.dtype == torch.float32
    assert source.x.tolist() == [[1, 2.5], [3, 40]]
    assert from_csv(tmp_path / "t.csv", features=["b"]).x.tolist() == [[2.5], [40]]


def test_columns_that_are_not_numbers_are_left_out_aloud(tmp_path, capfd):
    source = from_csv(write(tmp_path / "t.csv", "id,a,label\nx1,1,u\nx2,2,v\n"))
    assert source.x.shape == (2, 1)
    assert "left out: id" in capfd.readouterr().err


def test_values_stay_as_they_are_written(tmp_path):
    """A label 007 is not the number 7, and NA is a word."""
    source = from_csv(write(tmp_path / "t.csv", "text,label\n12,007\nNA,NA\ntrue,7\n"), text="text")
    assert source.classes == ("007", "7", "NA")
    assert source.x == ["12", "NA", "true"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", "text\tlabel\nhello there\tgreet\nbye, now\tleave\n"),
        ("t.csv", "text;label\nhello there;greet\nbye, now;leave\n"),
        ("t.csv", b"\xef\xbb\xbf" + TEXTS.encode()),
        ("t.csv", TEXTS.replace("\n", "\r\n")),
        ("t.csv", "\n" + TEXTS + "\n\n"),
    ],
)
def test_dialects(tmp_path, name, content):
    assert from_csv(write(tmp_path / name, content), text="text").x == ["hello there", "bye, now"]


def test_a_quoted_text_may_have_lines(tmp_path):
    assert from_csv(write(tmp_path / "t.csv", 'text,label\n"a\nb",u\nc,v\n'), text="text").x == ["a\nb", "c"]


def test_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(
        pa.table({"a": [1, 2], "s": ["p", "q"], "label": pa.array(["u", "v"]).dictionary_encode()}), path
    )
    assert from_parquet(path).x.tolist() == [[1], [2]]
    assert from_parquet(path, text="s").x == ["p", "q"]
    assert from_parquet(path, label="a", text="s").classes == ("1", "2")
    refused(lambda: from_parquet(write(tmp_path / "bad.parquet", "no")), "bad.parquet", "cannot be read as Parquet")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["the file is empty"]),
        ("\n\n", ["the file is empty"]),
        ("text,label\n", ["no rows"]),
        ("txt,label\na,b\n", ["no text column 'text'", "name one of: txt, label"]),
        ("text,Label\na,b\n", ["no label column 'label'", "name one of: Label, text"]),
        ("text,label,label\na,b,c\n", ["2 columns are called 'label'"]),
        ("text,label\na,u\n ,v\n", ["'text', data row 2, is empty"]),
        ("text,label\na,u\nb,\n", ["label in data row 2 is missing"]),
        ("text,label\na,u\nb,u\n", ["all 2 examples have the label 'u'", "at least 2 classes"]),
        ("text,label\na,u\nb,v,w\nc,x\n", ["line 3 has 3 values and the column names are 2"]),
        ("text,label\na,u\nb\n", ["line 3 has 1 values"]),
        (b"text,label\na,u\ncaf\xe9,v\n", ["line 3 is not UTF-8", "save the file as UTF-8"]),
        ("text,label\na,u\n".encode("utf-16"), ["UTF-16", "save the file as UTF-8"]),
        (b"text\0,label\na,u\n", ["not a text file"]),
    ],
)
def test_bad_csv_of_texts(tmp_path, content, parts):
    path = write(tmp_path / "t.csv", content)
    refused(lambda: from_csv(path, text="text"), str(path), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a,b,label\n1,2,x\n3,nan,y\n", ["column 'b', data row 2", "'nan', not a finite number"]),
        ("a,b,label\n1,2,x\n3,inf,y\n", ["column 'b', data row 2"]),
        ("a,b,label\n1,2,x\n3,1e300,y\n", ["column 'b', data row 2"]),
        ("a,b,label\n1,2,x\n3,,y\n4,5,y\n", ["column 'b', data row 2, is missing"]),
        ("a,b,label\n1,2,x\n3,four,y\n5,6,y\n", ["column 'b', data row 2", "'four'"]),
        ("a,label\nred,x\nblue,y\n", ["no numeric feature columns", "one of: a"]),
        ("a;label\n0,5;x\n1,5;y\n", ["no numeric feature columns", "'a' has a decimal comma: write 0.5 for 0,5"]),
    ],
)
def test_bad_csv_of_numbers(tmp_path, content, parts):
    path = write(tmp_path / "t.csv", content)
    refused(lambda: from_csv(path), str(path), *parts)


def test_missing_files(tmp_path):
    write(tmp_path / "train.csv", TEXTS)
    refused(lambda: from_csv(tmp_path / "trian.csv"), "trian.csv: no such file; did you mean 'train.csv'?")
    refused(lambda: from_csv(tmp_path), "it is a folder")
    refused(lambda: from_csv(tmp_path / "train.csv", text="text", features=["a"]), "not both")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "t.csv", TEXTS)
    path.chmod(0)
    refused(lambda: from_csv(path, text="text"), "not readable for this user")


def test_lookalike_labels_are_told_and_kept(tmp_path, capfd):
    source = from_csv(write(tmp_path / "t.csv", "text,label\na,Yes\nb,yes \nc,no\n"), text="text")
    assert source.classes == ("Yes", "no", "yes ")
    assert "'Yes' and 'yes ' differ only by blanks or case" in capfd.readouterr().err


def test_table_without_labels_and_with_targets(tmp_path):
    path = write(tmp_path / "t.csv", "a,b,price\n1,2,10\n3,4,2.5\n")
    plain = table(path)
    assert (plain.y, plain.features) == (None, ("a", "b", "price"))
    target = table(path, label="price", numeric_label=True)
    assert (target.y, target.features) == ([10.0, 2.5], ("a", "b"))
    assert table(path, label="price").y == ["10", "2.5"]
    swapped = write(tmp_path / "swapped.csv", "b,a\n4,3\n")
    assert table(swapped, features=target.features).x.tolist() == [[3, 4]]
    bad = write(tmp_path / "bad.csv", "a,price\n1,10\n2,dear\n")
    refused(lambda: table(bad, label="price", numeric_label=True), "column 'price', data row 2", "'dear'")


def test_folder(pictures):
    (pictures / "cat" / ".DS_Store").write_bytes(b"x")
    (pictures / "dog" / "Thumbs.db").write_bytes(b"x")
    (pictures / ".hidden").mkdir()
    (pictures / "README.txt").write_text("pets")
    picture(pictures / "dog" / "more" / "2.jpg")
    source = from_folder(pictures)
    assert (source.name, source.modality, source.classes) == ("pets", "image", ("cat", "dog"))
    assert source.counts.tolist() == [2, 3]
    assert all(isinstance(file, Path) and file.exists() for file in source.x)


def test_bad_folders(pictures, tmp_path):
    refused(lambda: from_folder(tmp_path / "nowhere"), "no such folder")
    refused(lambda: from_folder(pictures / "cat" / "0.png"), "it is a file")
    refused(lambda: from_folder(pictures / "cat"), "2 images and no sub-folders")
    refused(lambda: from_folder(tmp_path), "one class folder only ('pets')")
    (pictures / "empty").mkdir()
    refused(lambda: from_folder(pictures), "empty: there are no images")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda path: path.write_text("not an image"), "not an image"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:300] + b"\0" * 100 + path.read_bytes()[400:]), "damaged"),
        (lambda path: Image.new("1", (8000, 7000)).save(path), "8000 x 7000 pixels is more than the limit"),
        (lambda path: Image.new("1", (20000, 20000)).save(path), "far more pixels than the limit"),
    ],
)
def test_bad_images_in_a_folder(pictures, damage, part):
    damage(pictures / "dog" / "1.png")
    refused(lambda: from_folder(pictures), str(pictures / "dog" / "1.png"), part)


def test_several_bad_images_are_counted(pictures):
    for i in range(2):
        (pictures / "cat" / f"{i}.png").write_text("x")
    refused(lambda: from_folder(pictures), "0.png", "1 more files")


def test_truncated_jpeg(tmp_path):
    path = picture(tmp_path / "a.jpg", size=(200, 100))
    assert check_image(path) == (200, 100)
    path.write_bytes(path.read_bytes()[:2000])
    for reader in (check_image, open_image):
        refused(lambda reader=reader: reader(path), "damaged")


def test_open_image_makes_upright_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 4), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    for shape in ((5, 7), (5, 7, 1), (5, 7, 3), (3, 5, 7), (1, 5, 7)):
        assert open_image(np.zeros(shape, dtype=np.uint8)).size == (7, 5)
    refused(lambda: open_image(np.zeros((5, 7))), "uint8")
    refused(lambda: open_image(tmp_path), "it is a folder")


def test_arrays():
    assert from_arrays(np.eye(3), [0, 1, 1]).x.dtype == torch.float32
    assert from_arrays(torch.eye(2), torch.tensor([10, 9])).classes == ("9", "10")
    assert from_arrays(["a", "b"], np.array(["u", "v"])).modality == "text"
    assert from_arrays(np.array(["a", "b"], dtype=object), ["u", "v"]).x == ["a", "b"]
    named = from_arrays([[1.0], [2.0]], [1, 0], classes=["no", "yes"])
    assert [named.classes[i] for i in named.y] == ["yes", "no"]


@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 3, 6, 5), (2, 6, 5), (2, 1, 6, 5), (2, 6, 5, 1)])
def test_image_arrays_become_nchw(shape):
    source = from_arrays(np.zeros(shape, dtype=np.uint8), ["u", "v"])
    assert source.modality == "image"
    assert source.x.shape[2:] == (6, 5)
    assert source.x.shape[1] in (1, 3)


def test_image_paths_and_pil_images(pictures):
    files = sorted(pictures.rglob("*.png"))
    assert from_arrays(files, ["a", "a", "b", "b"]).modality == "image"
    assert from_arrays([open_image(f) for f in files], [0, 0, 1, 1]).modality == "image"
    refused(lambda: from_arrays([*files, pictures / "none.png"], [0, 0, 1, 1, 1]), "none.png: no such file")


@pytest.mark.parametrize(
    ("x", "y", "part"),
    [
        ([[1.0], [2.0]], [0], "x has 2 examples and y has 1 labels"),
        ([[1.0], [2.0]], [0, None], "label in data row 2 is missing"),
        ([[1.0], [2.0]], [0.0, float("nan")], "label in data row 2 is missing"),
        ([[1.0], [2.0]], [0.0, 0.5], "use a regressor"),
        ([[1.0], [2.0]], [1, 1], "all 2 examples have the label '1'"),
        ([[1.0], [float("inf")]], [0, 1], "data row 2 is missing or infinite"),
        ([[1.0], [2.0, 3.0]], [0, 1], "differ in shape"),
        ([1.0, 2.0], [0, 1], "neither features"),
        (["a", ""], [0, 1], "text in data row 2 is empty"),
        (["a", None], [0, 1], "text in data row 2 is empty"),
        ([], [], "x is empty"),
        (np.zeros((2, 3, 4, 4)), [0, 1], "neither features"),
        (np.zeros((2, 1), dtype=complex), [0, 1], "complex"),
        (np.zeros((2, 1)), np.zeros((2, 1)), "one label an example"),
    ],
)
def test_bad_arrays(x, y, part):
    refused(lambda: from_arrays(x, y), part)


def test_classes_and_labels_must_fit():
    refused(lambda: from_arrays(["a", "b"], [0, 2], classes=["u", "v"]), "class index 2 in data row 2")
    refused(lambda: from_arrays(["a", "b"], ["u", "w"], classes=["u", "v"]), "data row 2", "unknown class 'w'")


def test_huggingface():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["no", "never used", "yes"]),
        vector=datasets.Sequence(datasets.Value("float32")),
        image=datasets.Image(),
    )
    images = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    rows = {"text": ["a", "b"], "label": [2, 0], "vector": [[1.0, 2.0], [3.0, 4.0]], "image": images}
    data = datasets.Dataset.from_dict(rows, features=features)
    source = from_huggingface(data)
    assert source.classes == ("no", "yes")
    assert source.y.tolist() == [1, 0]
    assert from_huggingface(data, x="vector").x.tolist() == rows["vector"]
    pictured = from_huggingface(data, x="image")
    assert pictured.modality == "image"
    assert open_image(pictured.x[0]).getpixel((0, 0)) == (255, 0, 0)
    refused(lambda: from_huggingface(data, x="txt"), "did you mean 'text'")
    refused(lambda: from_huggingface(datasets.DatasetDict(train=data)), "choose one")
    unlabelled = datasets.Dataset.from_dict({**rows, "label": [2, -1]}, features=features)
    refused(lambda: from_huggingface(unlabelled), "label in data row 2 is missing")


def test_read_dispatches(tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = read(str(write(tmp_path / "t.csv", TEXTS)), text="text")
    assert source.modality == "text"
    assert read(source) is source
    assert read(pictures).modality == "image"
    assert read("digits").name == "digits"
    refused(lambda: read("digit"), "unknown data 'digit'", "did you mean 'digits'")
    refused(lambda: read("missing.csv"), "missing.csv: no such file")
    refused(lambda: read("some/folder"), "no such file or folder")
    refused(lambda: read(write(tmp_path / "t.xlsx", "x")), "unknown kind (.xlsx)")


def test_the_label_is_no_input(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("x,label\n1,0\n2,1\n")
    for columns in ({"features": ["x", "label"]}, {"text": "label"}):
        with pytest.raises(BadInput, match="'label' cannot be an input too"):
            from_csv(path, **columns)
