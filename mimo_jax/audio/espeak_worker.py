"""Speaks with the espeak-ng library, in a process of its own: `mimo_jax.audio.synth` runs this file, nobody imports it.

espeak-ng is GPL-3.0; only this process loads it (through ctypes), and it talks to its parent by pipe. Every line of
standard input is a JSON request `{"text", "voice", "rate", "pitch", "seed"}`. The answer is a JSON line
`{"samples": n, "rate": Hz, "words": [[character, samples], ...]}` followed by 2 n bytes of little-endian 16-bit PCM, or
`{"error": message}` alone.

The library keeps state from one utterance to the next (its noise and flutter generators), which no call resets. So each
utterance is spoken by a fork of the freshly initialised process: the same request gives the same samples, whatever was
spoken before it.
"""

import ctypes
import json
import os
import sys

_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback and espeak_Synth returns when all are done
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report errors instead of ending the process
_EVENT_END, _EVENT_WORD = 0, 1
_RATE, _PITCH = 1, 3
_POSITION_CHARACTER, _UTF8 = 1, 1


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """`espeak_EVENT` of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def _speak(library, sample_rate, request):
    pcm, words = bytearray(), []

    def collect(samples, count, events):
        if samples and count > 0:
            pcm.extend(ctypes.string_at(samples, 2 * count))
        index = 0
        while events[index].type != _EVENT_END:
            if events[index].type == _EVENT_WORD:
                words.append([events[index].text_position - 1, events[index].sample])
            index += 1
        return 0

    callback = _Callback(collect)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
        return _error(f"espeak-ng has no voice {request['voice']!r}")
    library.espeak_SetParameter(_RATE, request["rate"], 0)
    library.espeak_SetParameter(_PITCH, request["pitch"], 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(request["seed"]))
    text = request["text"].encode()
    status = library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
    if status != 0:
        return _error(f"espeak_Synth returned {status}")
    header = {"samples": len(pcm) // 2, "rate": sample_rate, "words": words}
    return json.dumps(header).encode() + b"\n" + bytes(pcm)


def _error(message):
    return json.dumps({"error": message}).encode() + b"\n"


def main():
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    sample_rate = library.espeak_Initialize(_SYNCHRONOUS, 500, data, _DONT_EXIT)
    if sample_rate <= 0:
        sys.exit("espeak-ng did not start: espeak_Initialize failed")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sys.stdout.buffer.write(_speak(library, sample_rate, json.loads(line)))
                sys.stdout.buffer.flush()
                status = 0
            finally:
                os._exit(status)
        _, wait_status = os.waitpid(child, 0)
        if wait_status != 0:
            sys.stdout.buffer.write(_error(f"espeak-ng failed with wait status {wait_status}"))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
