"""Damage inside JPEG files that decoders repair without an error: they continue with grey, shifted or wrong pixels."""

from __future__ import annotations

import re

import simplejpeg

ZEROED = 32  # zero bytes in a row; see `_impossible_zeros`
ZEROED_REFINEMENT = 256
REPAIRED = ("Corrupt JPEG data", "Premature end of JPEG file")  # not the decoder's remarks on unusual headers
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed byte, a restart nor a fill byte
_ZEROS = {count: re.compile(rb"\x00{%d,}" % count) for count in (ZEROED, ZEROED_REFINEMENT)}
SIGNATURE = b"\xff\xd8\xff"


def jpeg_damage(content: bytes) -> str:
    """What is wrong with the pixels of a JPEG file that can be decoded.

    libjpeg counts what it repairs, and neither Pillow nor torchvision hands that on, so that the file is read once
    more, by `simplejpeg`, at an eighth of its size. Where the rest of a damaged stretch happens to have the right
    length libjpeg sees nothing, so that stretches of zero bytes, which file systems leave behind, are looked for too.
    Of damage to the last scans of a progressive file, which blurs it a little, some goes unseen.

    Args:
        content: a file of any kind.

    Returns:
        The decoder's words, or "" for a sound JPEG file and for whatever is none.
    """
    if not content.startswith(SIGNATURE):
        return ""
    return _repaired(content) or _zeroed(content)


def _repaired(content: bytes) -> str:
    """The warning of libjpeg, or ""; an error, as of a colour space that is unknown to it, is none."""
    try:
        simplejpeg.decode_jpeg(content, "GRAY", fastdct=True, min_height=1, min_width=1, strict=True)
    except ValueError as error:
        message = str(error)
        return message if message.startswith(REPAIRED) else ""
    except (MemoryError, RuntimeError):
        return ""
    return ""


def _zeroed(content: bytes) -> str:
    """Where zero bytes stand in place of pixels, or ""."""
    if bytes(ZEROED) not in content:  # so it is with nearly all files, and quickly seen
        return ""
    tables: dict[int, int] = {}  # of Huffman codes: the symbol whose code is all zeros
    frame, position = 0, 2
    while position + 4 <= len(content):
        if content[position] != 0xFF:
            return ""  # no marker where one should be
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xD9:
            return ""
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        segment = content[position + 4 : end]
        if marker == 0xC4:
            tables |= _first_symbols(segment)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            frame = marker
        position = end
        if marker == 0xDA:
            following = _NEXT_MARKER.search(content, end)
            position = following.start() if following else len(content)
            if frame in (0xC0, 0xC1, 0xC2) and (count := _impossible_zeros(frame == 0xC2, segment, tables)):
                found = _ZEROS[count].search(content, end, position)
                if found:
                    return f"{found.end() - found.start()} zero bytes in place of pixels at byte {found.start()}"
    return ""


def _first_symbols(segment: bytes) -> dict[int, int]:
    """The symbol of the code that is all zeros, which is the first one, for each table of a DHT segment."""
    first, position = {}, 0
    while position + 17 < len(segment):
        count = sum(segment[position + 1 : position + 17])
        first[segment[position]] = segment[position + 17]
        position += 17 + count
    return first


def _impossible_zeros(progressive: bool, header: bytes, tables: dict[int, int]) -> int:
    """How many zero bytes in a row no encoder writes into a scan; 0 where any number may stand for an empty area.

    Where the code of all zeros stands for a value other than "nothing more", a row of them means tens of equal
    coefficients one after the other, which no picture has. Further bits of known coefficients may all be 0 in a
    regular pattern, but libjpeg writes no more than 1000 of them (125 bytes) without a code between.
    """
    components = header[0] if header else 0
    if len(header) < 4 + 2 * components or components == 0:
        return 0
    choices = [header[2 + 2 * number] for number in range(components)]
    of_dc = [tables.get(choice >> 4, 0) for choice in choices]
    of_ac = [tables.get(0x10 | (choice & 15), 0) for choice in choices]
    is_dc, is_refinement = progressive and header[1 + 2 * components] == 0, progressive and header[-1] >> 4 > 0
    if is_refinement:
        return 0 if is_dc or of_ac[0] & 15 == 0 else ZEROED_REFINEMENT
    return ZEROED if any(of_dc if is_dc else of_ac) else 0  # 0: no difference, or the end of a block
