"""Checks of ``.pt`` and ``.pth`` files before PyTorch loads them.

PyTorch's ``weights_only`` loader runs no code of a file, but trusts the sizes in it:
a few kilobytes can ask for terabytes, or for work that does not end. Here the pickle is read as a
list of instructions, none of which is carried out, and the archive around it as a list of records.
"""

import io
import os
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flashdreams.runtime.text import shown

MAX_PICKLE_BYTES = 2**22
"""Largest pickle of a file, which lists its tensors: some 20,000."""
MAX_INSTRUCTIONS = 500_000
"""Most instructions of a file's pickles."""
MAX_OBJECTS = 2_000_000
"""Most objects in a value, each counted as often as it is reached."""
MAX_DEPTH = 64
"""Most levels of a value."""
MAX_OTHER_KEYS = 10_000
"""Most keys that are not text: numbers can be chosen so that each collides with all others."""
MAX_DIRECTORY_BYTES = 2**24
"""Longest list of records of an archive."""

_CALLABLE = {
    "collections OrderedDict",
    "builtins set",
    "builtins complex",
    "_codecs encode",
    "torch Size",
    "torch device",
    "torch.serialization _get_layout",
    *(
        f"torch._utils _rebuild_{kind}"
        for kind in (
            *("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state"),
            *("sparse_tensor", "meta_tensor_no_storage"),
        )
    ),
}
"""What a pickle of tensors calls. PyTorch allows more, such as ``bytearray``, which take a size."""

_MARK: Any = object()
_PULLS_TO_MARK = {"APPENDS", "SETITEMS", "ADDITEMS"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_EMPTY = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE", "NONE", "NEWTRUE", "NEWFALSE"}
_COLLECTS = {"TUPLE", "LIST", "DICT", "FROZENSET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class HostileFile(ValueError):
    """A file that claims more than it has; the text says what."""


@dataclass(slots=True, eq=False)
class _Value:
    """The result of an instruction, without its data."""

    weight: int = 1
    depth: int = 0
    constant: Any = None
    """Text, a number, or ``module name`` of a global."""
    items: tuple["_Value", ...] = ()
    """Of a short tuple."""


def check_pickle_file(path: Path) -> None:
    """Refuse a ``.pt`` or ``.pth`` file that needs time or memory out of proportion to its size.

    Raises:
        HostileFile: it does; with the reason.
        OSError: it cannot be read.
        Exception: it is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_archive(file, size)
            return
        file.seek(0)
        content = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    scan = _Scan(size)
    # The format of torch 1.5 and older: magic number, version, system, tensors, keys, then data.
    for _ in range(5):
        try:
            scan.run(content)
        except HostileFile:
            raise
        except Exception as error:
            if size > MAX_PICKLE_BYTES and content.tell() >= MAX_PICKLE_BYTES:
                raise HostileFile(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes") from error
            return  # not a pickle, or a damaged one: the loader reports it


def _check_archive(file: BinaryIO, size: int) -> None:
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.filename.endswith("/constants.pkl") for record in records):
            return  # TorchScript, which the loader refuses unread
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise HostileFile("its records are compressed, which PyTorch never does")
        if sum(record.file_size for record in records) > size:
            raise HostileFile("its records claim more bytes than the file has")
        scan = _Scan(size)
        for record in records:
            if record.filename.endswith(".pkl"):
                if record.file_size > MAX_PICKLE_BYTES:
                    raise HostileFile(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
                if record.filename.endswith("data.pkl"):
                    scan.run(io.BytesIO(archive.read(record)))


def _check_directory(file: BinaryIO, size: int) -> None:
    """Check the length of an archive's directory before it is read.

    Source: PKWARE's APPNOTE.TXT, 4.3.14 to 4.3.16.
    """
    file.seek(max(0, size - 2**16 - 128))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    length = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    wide = tail.rfind(b"PK\x06\x06")
    if length == 2**32 - 1 and wide >= 0:
        length = int.from_bytes(tail[wide + 40 : wide + 48], "little")
    if length > MAX_DIRECTORY_BYTES:
        raise HostileFile(f"its list of records has {length} bytes")
    file.seek(0, os.SEEK_SET)


class _Scan:
    """Follows the instructions of pickles with object counts instead of values."""

    def __init__(self, file_bytes: int) -> None:
        self.file_bytes = file_bytes
        self.instructions = 0
        self.other_keys = 0
        self.stack: list[_Value] = []
        self.memo: dict[int, _Value] = {}

    def run(self, content: BinaryIO) -> None:
        """One pickle, up to its end."""
        self.stack, self.memo = [], {}
        for opcode, argument, _ in pickletools.genops(content):
            self.instructions += 1
            if self.instructions > MAX_INSTRUCTIONS:
                raise HostileFile(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")
            self.step(opcode, argument)

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name, stack = opcode.name, self.stack
        if name == "MARK":
            stack.append(_MARK)
        elif name in _PUTS or name == "MEMOIZE":
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[int(argument)])
        elif name in _EMPTY:
            stack.append(_Value())
        elif name in _COLLECTS or name in _TUPLES:
            items = self.pull(_TUPLES.get(name))
            value = self.grow(_Value(), items)
            value.items = tuple(items) if len(items) <= 8 else ()
            stack.append(value)
        elif name in _PULLS_TO_MARK or name in ("APPEND", "SETITEM", "BUILD"):
            items = self.pull({"APPEND": 1, "BUILD": 1, "SETITEM": 2}.get(name))
            if name.startswith("SETITEM"):
                self.count_keys(items[::2])
            self.grow(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_Value(constant=argument))
        elif name == "STACK_GLOBAL":
            module, attribute = self.pull(2)
            stack.append(_Value(constant=f"{module.constant} {attribute.constant}"))
        elif name in ("REDUCE", "NEWOBJ", "BINPERSID"):
            self.call(name)
        elif name in ("POP", "POP_MARK"):
            self.pull(1 if name == "POP" else None)
        elif name not in ("PROTO", "FRAME", "STOP"):
            self.push_constant(opcode, argument)

    def push_constant(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        if opcode.stack_before or len(opcode.stack_after) != 1:
            raise HostileFile(f"it uses the instruction {opcode.name}, which no tensor needs")
        self.stack.append(_Value(constant=argument))

    def pull(self, count: int | None) -> list[_Value]:
        """Take so many values from the stack; None: all above the last mark, and the mark."""
        if count is None:
            at = len(self.stack) - 1
            while self.stack[at] is not _MARK:
                at -= 1
            items = self.stack[at + 1 :]
            del self.stack[at:]
            return items
        items = self.stack[len(self.stack) - count :]
        if len(items) != count or _MARK in items:
            raise ValueError("the pickle is invalid")
        del self.stack[len(self.stack) - count :]
        return items

    def grow(self, value: _Value, items: list[_Value]) -> _Value:
        """Put items into a value."""
        value.weight += sum(item.weight for item in items)
        value.depth = max(value.depth, 1 + max((item.depth for item in items), default=-1))
        if value.weight > MAX_OBJECTS:
            raise HostileFile(f"one of its values unfolds into more than {MAX_OBJECTS} objects")
        if value.depth > MAX_DEPTH:
            raise HostileFile(f"its values are nested more than {MAX_DEPTH} deep")
        return value

    def call(self, name: str) -> None:
        """A call, or a storage that is looked up by its key and its size."""
        if name == "BINPERSID":
            (key,) = self.pull(1)
            for item in key.items:
                if isinstance(item.constant, int) and item.constant > self.file_bytes:
                    raise HostileFile(
                        f"a storage of {item.constant} numbers in a file of {self.file_bytes} bytes"
                    )
            self.stack.append(_Value())
            return
        function, arguments = self.pull(2)
        if function.constant not in _CALLABLE or name != "REDUCE":
            called = str(function.constant).replace(" ", ".")
            raise HostileFile(f"it asks Python to run {shown(called)}")
        self.stack.append(self.grow(_Value(), [arguments]))

    def count_keys(self, keys: list[_Value]) -> None:
        self.other_keys += sum(not isinstance(key.constant, str) for key in keys)
        if self.other_keys > MAX_OTHER_KEYS:
            raise HostileFile(f"more than {MAX_OTHER_KEYS} of its keys are not text")
