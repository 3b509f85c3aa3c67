"""What differs between pictures and sounds, once: words, endings, how a file is written, read and looked at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nexus.errors import UsageError

FILM = ".mp4"                    # of a walk between pictures
WALK_COLUMNS = 16


class Style(NamedTuple):
    """How sounds are written. form: where no name says it; loudness: LUFS, None = as they were made."""

    form: str | None = None
    bits: int = 16
    loudness: float | None = None


class Kind(NamedTuple):
    """A kind of media. endings: of its files, the usual one first; others: those that only some of them can have.

    encode(item, path, record, style) -> the bytes of a file; look(item) -> uint8 [H, W, C]; record(path) -> what is
    stored in a file, or None; check(request): the files that a request names, before a model is loaded for them.
    """

    name: str
    noun: str
    endings: tuple[str, ...]
    others: tuple[str, ...]
    encode: Callable[[Any, Path | None, dict | None, Style], bytes]
    look: Callable[[Any], Any]
    record: Callable[[Path], dict | None]
    check: Callable[[Any], Any]

    @property
    def nouns(self) -> str:
        """Several of them."""
        return f"{self.noun}s"

    def ends(self, path: str | Path) -> bool:
        """Whether a file of this kind can have this name."""
        return str(path).lower().endswith((*self.endings, *self.others))


def kind_of(system: str) -> Kind:
    """What a system of the catalog makes."""
    from nexus.catalog import entry
    return KINDS[entry(system).kind]


def _encode_picture(item, path: Path | None, record: dict | None, style: Style) -> bytes:
    """A picture, a walk's film, or the sheet of its frames."""
    from nexus import images
    if path is not None and path.suffix.lower() == FILM:
        if item.data.ndim != 4:
            raise UsageError(f"'{path}': one picture makes no film", hint="--interpolate 24, or another ending")
        from nexus.videos import encode_mp4
        return encode_mp4(item.data, record)
    return images.encode(_look_at_picture(item), images.format_of(path) if path else "PNG", record)


def _look_at_picture(item):
    """A picture as it is; the frames [K, H, W, C] of a walk side by side."""
    from nexus import images
    return images.contact_sheet(list(item.data), min(len(item.data), WALK_COLUMNS)) if item.data.ndim == 4 \
        else item.data


def _picture_record(path: Path) -> dict | None:
    if Path(path).suffix.lower() == FILM:
        from nexus.videos import read_record
    else:
        from nexus.images import read_record
    return read_record(path)


def _check_pictures(request) -> None:
    from nexus.process.sources import read_files
    read_files(request)


def _encode_sound(item, path: Path | None, record: dict | None, style: Style) -> bytes:
    from nexus import sounds
    from nexus.loudness import levelled
    sound = item.data if style.loudness is None else levelled(item.data, item.rate, style.loudness)
    form = sounds.format_of(path) if path else style.form or "WAV"
    return sounds.encode_sound(sound, item.rate, form, record, bits=style.bits)


def _look_at_sound(item):
    from nexus.spectrograms import spectrogram
    return spectrogram(item.data, item.rate)


def _sound_record(path: Path) -> dict | None:
    from nexus.sounds import read_record
    return read_record(path)


def _check_sounds(request) -> None:
    from nexus.sounds import read_sound
    for path in (request.melody, request.continued):
        if path is not None:
            read_sound(path)


PICTURES = Kind("image", "picture", (".png", ".jpg", ".jpeg", ".webp", ".gif"), (FILM,), _encode_picture,
                _look_at_picture, _picture_record, _check_pictures)
SOUNDS = Kind("audio", "sound", (".wav", ".flac", ".ogg", ".mp3"), (), _encode_sound, _look_at_sound, _sound_record,
              _check_sounds)
KINDS = {kind.name: kind for kind in (PICTURES, SOUNDS)}
