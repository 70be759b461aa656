"""From files to files: what `effseg predict` does with a file or a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import clip_reader, codecs
from effseg_jax.prediction.inputs import files_in
from effseg_jax.prediction.pictures import PictureSegmenter
from effseg_jax.prediction.video import VideoOptions, is_url, is_video, name_of_url, save_video

if TYPE_CHECKING:
  from effseg_jax.prediction.audio_visual import ClipSegmenter

Line = Callable[[str], None]


def predict(
  segmenter: PictureSegmenter | ClipSegmenter,
  source: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  report: Line = print,
  complain: Line = print,
  video: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
  """Segments a file, or the files of a folder and its subfolders, which `output` then mirrors.

  A file that cannot be read is reported and left out.

  Args:
    segmenter: of `effseg_jax.load`.
    source: a picture, a clip, or a folder; a video may be a URL.
    output: folder for the results; made if it is missing. `a/b.jpg` below `source` becomes
      `a/b_overlay.png` and others below `output`; where `a` holds several pictures of that name,
      `a/b.jpg_overlay.png`.
    report: gets a line for each file.
    complain: gets a line for each file that cannot be read.
    video: fields of `VideoOptions`, for videos through a model for pictures.

  Returns:
    How many files were segmented, and how many could not be.

  Raises:
    UserError: if there is nothing to read, or the folder cannot be made.
  """
  settings = dict(video or {})
  VideoOptions(**settings)  # complains before anything is read
  folder = Path(output)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--output={output} is a file; expected a folder.")
  paths, top = _inputs(segmenter, source, report)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--output={output} cannot be made ({error.strerror}).") from None
  stems = _stems(paths, top, folder)
  done = failed = 0
  for name, outcome in _segment(segmenter, list(zip(paths, stems, strict=True)), settings):
    if isinstance(outcome, UserError):
      failed += 1
      complain(f"skipped: {outcome}")
    else:
      done += 1
      report(f"{name}: {outcome}")
  return done, failed


def _inputs(
  segmenter: PictureSegmenter | ClipSegmenter, source: Any, report: Line
) -> tuple[list[Any], Path]:
  """What is to be read, and the folder that the output mirrors."""
  if isinstance(source, str) and is_url(source):
    return [source], Path()
  source = Path(source)
  if not isinstance(segmenter, PictureSegmenter):
    suffixes = ", ".join(clip_reader.VIDEO_SUFFIXES)
    expected = f"a clip: a video ({suffixes}), or frames with one sound file in a folder"
    paths, results = files_in(source, clip_reader.is_clip, expected)
  else:
    expected = f"a picture ({', '.join(codecs.PICTURE_SUFFIXES)}) or a video"
    paths, results = files_in(source, lambda path: _is_picture(path) or is_video(path), expected)
  if results:
    report(f"note: {results} results of an earlier prediction in {source} were left out")
  return paths, source if source.is_dir() and paths != [source] else source.parent


def _is_picture(path: Path) -> bool:
  return codecs.is_picture(path) and path.is_file()


def _stems(paths: Sequence[Any], top: Path, folder: Path) -> list[Path]:
  """Where the results of each input go, without suffix."""
  if paths and isinstance(paths[0], str):
    return [folder / name_of_url(paths[0])]
  below = [path.relative_to(top) for path in paths]
  counts = Counter(path.with_suffix("") for path in below)
  # a.jpg and a.png must not overwrite each other's results.
  return [
    folder / (path.with_suffix("") if counts[path.with_suffix("")] == 1 else path) for path in below
  ]


def _segment(
  segmenter: PictureSegmenter | ClipSegmenter, work: Sequence[tuple[Any, Path]], options: Any
) -> Iterator[tuple[str, str | UserError]]:
  """Each input's name, and the line about it or what is wrong with it."""
  if not isinstance(segmenter, PictureSegmenter):
    for path, stem in work:
      yield _name(path), _tried(lambda: segmenter.save_to(path, stem))  # noqa: B023
    return
  pictures = [pair for pair in work if not is_video(pair[0])]
  for (path, stem), result in zip(
    pictures, segmenter.results(path for path, _ in pictures), strict=True
  ):
    yield (
      _name(path),
      result
      if isinstance(result, UserError)
      else _tried(
        lambda: _saved(result, stem)  # noqa: B023
      ),
    )
  for path, stem in work:
    if is_video(path):
      yield _name(path), _tried(lambda: save_video(segmenter, path, stem, **options))  # noqa: B023


def _saved(result: Any, stem: Path) -> str:
  result.save(stem)
  return f"{result.describe()}  {result.milliseconds:.0f} ms"


def _tried(work: Callable[[], str]) -> str | UserError:
  try:
    return work()
  except UserError as error:
    return error


def _name(path: Any) -> str:
  return path if isinstance(path, str) else path.name
