"""Tokenise a stream of documents in several processes, in order, in bounded memory."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from itertools import chain
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from data.tokenizer import Codec
from recipes.errors import DataError

type Encoded = tuple[int, NDArray[np.int32]]
"""UTF-8 bytes and ids of one document."""

_BATCH_CHARACTERS = 1 << 18


def encode_all(codec: Codec, texts: Iterable[str], workers: int) -> Iterator[Encoded]:
    """Encode documents in the order given, whatever the number of workers.

    One batch of 256 k characters (or one longer document) is in flight per worker.

    Raises:
        DataError: a worker died, for example for lack of memory.
    """
    batches = _batched(texts)
    if workers <= 1:
        return chain.from_iterable(_encode(codec, b) for b in batches)
    return _encode_in_processes(codec, batches, workers)


def _encode_in_processes(
    codec: Codec, batches: Iterator[list[str]], workers: int
) -> Iterator[Encoded]:
    """Batch i goes to worker i % workers, and results are fetched in that order."""
    # Not fork: the caller may have threads (torch, pyarrow) or a GPU. A fresh process needs only
    # numpy and the tokenizer, half a second.
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes = []
    busy = [False] * workers
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(codec, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the death of the worker is the end of the pipe
            connections.append(ours)
            processes.append(process)
        turn = 0
        for batch in batches:
            if busy[turn]:
                yield from connections[turn].recv()
            connections[turn].send(batch)
            busy[turn] = True
            turn = (turn + 1) % workers
        for _ in range(workers):
            if busy[turn]:
                yield from connections[turn].recv()
            turn = (turn + 1) % workers
    except (EOFError, ConnectionError) as error:
        raise DataError(
            f"data.prepare_workers={workers}: a tokenizing process died, perhaps for lack of "
            "memory; use fewer workers and run again, finished parts are kept"
        ) from error
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


def _work(codec: Codec, connection: Connection) -> None:
    """Serve batches until the other end closes, be it by death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    while True:
        try:
            connection.send(_encode(codec, connection.recv()))
        except (EOFError, ConnectionError):
            return


def _encode(codec: Codec, texts: list[str]) -> list[Encoded]:
    return [(len(text.encode()), codec.encode(text)) for text in texts]


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
