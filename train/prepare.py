"""Datasets that are made from archives, in the form of tensorflow-datasets, without TensorFlow.

A builder of our own writes array_record, with the name, version and features of the stock builder,
so that `tfds.data_source` reads the result as if the stock builder had written it. Nothing of an
archive is unpacked to disk.
"""

import hashlib
import http.client
import io
import itertools
import json
import shutil
import sys
import urllib.request
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from train.logs import read_json, say, show_progress

_TIMEOUT_S = 20
# In a prepared directory: the checksum of each archive that it was made from.
_MARKER = "archives.json"
_ACCEPT = "--config.data.allow_unofficial=true accepts it"

_SHARD, _CHUNK = 10_000, 100  # examples

# For each split its keys, and what gives the example of a key, as the builder's features take it.
Splits = dict[str, tuple[Collection[Any], Callable[[Any], dict[str, Any]]]]


class Source(NamedTuple):
    """A dataset that is made from archives.

    Attributes:
      name: Of the dataset and of the stock builder.
      version: Of the stock builder.
      url: Folder of the archives, or a page where one has to register.
      checksums: Of each archive by its file name.
      records: Images of each split that is used, in the official archives.
      shape: Of the images, (H, W, C); None for what differs among them.
      mean: Per channel, of pixels on [0, 1].
      std: Per channel, of pixels on [0, 1].
      label_names: By class.
      pad: Pixels of padding for random crops; 0 for none.
      flip: Whether images may be mirrored left to right.
      text: Name of a feature of text beside image and label; "" for none.
      encoding: Of the images, as the stock builder declares it.
      algorithm: Of the checksums, "SHA-256" or "MD5".
      registration: Whether the archives can be downloaded only by hand.
    """

    name: str
    version: str
    url: str
    checksums: dict[str, str]
    records: dict[str, int]
    shape: tuple[int | None, int | None, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_names: tuple[str, ...]
    pad: int = 0
    flip: bool = False
    text: str = ""
    encoding: str | None = None
    algorithm: str = "SHA-256"
    registration: bool = False


def folder(source: Source, data_dir: Path) -> Path:
    """Return where the prepared dataset is, or will be."""
    return data_dir / source.name / source.version


def make(
    source: Source,
    data_dir: Path,
    *,
    allow_unofficial: bool,
    read: Callable[[Source, Path], Splits],
) -> bool:
    """Make the prepared directory from the archives, if there is none; it appears complete or not.

    It is written under another name and renamed when complete, so that a process killed in between
    leaves nothing that a later call could take for it.

    Args:
      source: What to prepare.
      data_dir: Folder of tensorflow-datasets; archives are in its downloads/manual.
      allow_unofficial: Accept archives of other checksums, with a warning.
      read: Reads the archives of a source in a folder.

    Returns:
      Whether it was made from the official archives.

    Raises:
      ValueError: If an archive, or what is prepared, is not official or is damaged.
      FileNotFoundError: If an archive is absent and cannot be downloaded, naming the files, the
        folder and the URLs.
    """
    if not folder(source, data_dir).exists():
        _make(source, data_dir, allow_unofficial, read)
    return _check(source, data_dir, allow_unofficial)


def _make(
    source: Source,
    data_dir: Path,
    allow_unofficial: bool,
    read: Callable[[Source, Path], Splits],
) -> None:
    with _locked(data_dir / f".{source.name}.lock"):
        target = folder(source, data_dir)
        if target.exists():  # Another process made it while we waited.
            return
        for left_by_a_kill in target.parent.glob(f"incomplete.*_{target.name}"):
            shutil.rmtree(left_by_a_kill)
        archives = _fetch(source, data_dir / "downloads" / "manual")
        say(f"preparing {target} from {', '.join(source.checksums)}")
        sums = {file: _checksum(source, archives / file) for file in source.checksums}
        for file, problem in _unofficial(source, sums):
            if not allow_unofficial:
                raise ValueError(f"{archives / file}: {problem}; {_ACCEPT}")
        builder_class(source)(data_dir=data_dir).write(read(source, archives), sums)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # Not on Windows, where array_record is not either.

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check(source: Source, data_dir: Path, allow_unofficial: bool) -> bool:
    """Return whether a directory was made from official archives; else refuse it, or warn."""
    target = folder(source, data_dir)
    # Without a marker tensorflow-datasets itself prepared it, which verifies checksums.
    if not (target / _MARKER).exists():
        return True
    try:
        problems = list(_unofficial(source, read_json(target / _MARKER)))
    except ValueError as error:
        raise ValueError(unreadable(target, error)) from None
    if not problems:
        return True
    file, problem = problems[0]
    message = f"{target}: made from an unofficial {file}: {problem}"
    if not allow_unofficial:
        raise ValueError(
            f"{message}; {_ACCEPT}, deleting the folder prepares it anew from the official one"
        )
    warnings.warn(f"{message}; accepted by allow_unofficial", stacklevel=4)
    return False


def _unofficial(source: Source, sums: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each archive whose checksum is not the official one, and what is wrong."""
    for file, expected in source.checksums.items():
        if sums.get(file) != expected:
            yield file, f"expected {source.algorithm} {expected}, got {sums.get(file)}"


def builder_class(source: Source) -> Any:
    """Return a builder like the stock one of that name; its `write` takes splits and checksums."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.hashing import Hasher

    # Not registered: the stock builder of the same name must stay importable.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(source.version)
        splits_to_write: Splits
        sums: dict[str, str]
        stdout: Any  # of the program

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=source.shape, encoding_format=source.encoding),
                "label": tfds.features.ClassLabel(names=source.label_names),
            }
            if source.text:
                features[source.text] = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage=source.url,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager  # The archives are already here.
            # data_path is still the temporary directory: the marker appears with the data.
            (Path(self.data_path) / _MARKER).write_text(json.dumps(self.sums))
            return self.splits_to_write

        def _generate_examples(self, split: str) -> Iterator[tuple[Any, dict[str, Any]]]:
            """Give examples in the order of the stock builder: that of their keys' hashes."""
            keys, example = self.splits_to_write[split]
            for key in sorted(keys, key=Hasher(split).hash_key):
                yield key, example(key)

        def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
            # Not the inherited way: it would shuffle what it has written, from one GB on with
            # TensorFlow.
            del download_config
            info = self._info()  # of the temporary directory, unlike self.info
            writer = tfds.core.SequentialWriter(info, _SHARD, file_format="array_record")
            for split, (keys, _) in self._split_generators(dl_manager).items():
                writer.initialize_splits([split])
                examples = (example for _, example in self._generate_examples(split))
                chunks = show_progress(
                    range(0, len(keys), _CHUNK),
                    title=f"{source.name}: {split}",
                    unit="img",
                    size=_CHUNK,
                    total=-(-len(keys) // _CHUNK),
                )
                with redirect_stdout(self.stdout):
                    for _ in chunks:
                        writer.add_examples({split: list(itertools.islice(examples, _CHUNK))})
                writer.close_splits([split])
            self.info.set_splits(info.splits)

        def write(self, splits: Splits, sums: dict[str, str]) -> None:
            self.splits_to_write, self.sums, self.stdout = splits, sums, sys.stdout
            tfds.disable_progress_bar()
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            with redirect_stdout(io.StringIO()):  # It prints what `_make` has said.
                self.download_and_prepare(download_config=config, file_format="array_record")

    Builder.name = source.name
    return Builder


def unreadable(target: Path, error: Exception) -> str:
    """Say that a prepared directory cannot be read."""
    return (
        f"{target}: expected a dataset prepared as array_record, got {one_line(error)}; "
        "deleting the folder prepares it anew"
    )


def one_line(error: BaseException) -> str:
    """Say what an exception says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _fetch(source: Source, archives: Path) -> Path:
    """Return the folder of the archives, after downloading those that are absent."""
    missing = [file for file in source.checksums if not (archives / file).is_file()]
    if missing and source.registration:
        raise FileNotFoundError(
            f"{source.name}: missing {', '.join(missing)}: register at {source.url}, download by "
            f"hand and place in {archives}"
        )
    for done, file in enumerate(missing):
        try:
            _download(source, file, archives / file)
        except (OSError, http.client.HTTPException) as error:
            files = ", ".join(f"{file} ({source.url}{file})" for file in missing[done:])
            raise FileNotFoundError(
                f"{source.name}: missing {files}: download by hand and place in {archives}; "
                f"downloading failed with {one_line(error)}"
            ) from None
    return archives


def _download(source: Source, file: str, path: Path) -> None:
    """Download an archive; whatever goes wrong, no partial or other file gets that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, url = path.with_name(f"{path.name}.part"), source.url + file
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, part.open("wb") as whole:
            shutil.copyfileobj(response, whole)
        got = _checksum(source, part)
        if got != source.checksums[file]:
            raise ValueError(
                f"{url}: expected {source.algorithm} {source.checksums[file]}, got {got}"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _checksum(source: Source, path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, source.algorithm.replace("-", "")).hexdigest()
