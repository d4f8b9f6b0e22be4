"""Streamed decoding of 60 minutes against 10: resident memory, speed, and distance from decoding at once.

    python benchmarks/streaming_memory.py TOKENIZER --audio FOLDER [--minutes 10 60] [--chunk-seconds 1]

TOKENIZER is a workdir of a tokenizer run or a folder of published weights. The recordings in FOLDER are encoded and the
codes repeated; then, for either decoder norm, they are streamed to a WAV file, each duration in a process of its own
(`ru_maxrss`), and the longest is compared with decoding every 60 s segment at once. The weights are used as they are
with both norms: the figures are of arithmetic, not of quality.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The parent imports no JAX: on Linux the peak of a child begins at the size of its parent.


def load(tokenizer: str, norm: str):
    from mimo_jax.interop.published import load_tokenizer
    from mimo_jax.loading import load_codec
    from mimo_jax.models.tokenizer.codec import Codec

    if (Path(tokenizer) / "model.safetensors").is_file():
        config, variables = load_tokenizer(tokenizer)
        compute = {}
    else:
        codec = load_codec(tokenizer)
        config, variables, compute = codec.config, codec.variables, {"compute": codec.compute}
    config = dataclasses.replace(config, decoder_norm=norm)
    return Codec(config, variables["params"], variables["codebook"], **compute)


def encode(tokenizer: str, norm: str, codes: str, minutes: float, audio: str) -> dict[str, float]:
    import numpy as np

    from mimo_jax.audio.files import load_audio

    codec = load(tokenizer, norm)
    rate = codec.config.mel.sample_rate
    wav = np.concatenate([load_audio(path, rate) for path in sorted(Path(audio).glob("*.wav"))])
    codes_MR = codec.encode([wav])[0]
    index = np.arange(round(minutes * 60 * codec.config.frame_rate)) % len(codes_MR)
    np.save(codes, codes_MR[index])
    return {"recorded_seconds": len(wav) / rate, "seconds": len(index) / codec.config.frame_rate}


def stream(tokenizer: str, norm: str, codes: str, minutes: float, chunk: int) -> dict[str, float]:
    import numpy as np

    from mimo_jax.audio.files import save_wav_pieces
    from mimo_jax.models.tokenizer.streaming import CodecStream

    codec = load(tokenizer, norm)
    codes_MR = np.load(codes, mmap_mode="r")[: round(minutes * 60 * codec.config.frame_rate)]
    decoder = CodecStream(codec, chunk)
    times: list[float] = []

    def waves():
        for first in range(0, len(codes_MR), chunk):
            start = time.perf_counter()
            wav = decoder.push(codes_MR[first : first + chunk])
            times.append(time.perf_counter() - start)
            yield wav
        yield decoder.finish()

    save_wav_pieces(f"{codes}.wav", waves(), codec.config.mel.sample_rate)
    after = np.sort(times[-len(times) * 4 // 5 :])  # what is compiled is compiled by then
    return {
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "chunk_ms": 1e3 * float(after.mean()),
        "chunk_ms_p99": 1e3 * float(after[int(len(after) * 0.99)]),
        "real_time_factor": float(after.mean()) * codec.config.frame_rate / chunk,
        "wav_mib": Path(f"{codes}.wav").stat().st_size / 2**20,
        "look_ahead_seconds": decoder.look_ahead_seconds,
        "latency_seconds": decoder.latency_seconds,
    }


def compare(tokenizer: str, norm: str, codes: str, minutes: float, chunk: int) -> dict[str, float]:
    import numpy as np

    from mimo_jax.models.tokenizer.streaming import stream_deviation

    return dataclasses.asdict(stream_deviation(load(tokenizer, norm), np.load(codes, mmap_mode="r"), chunk))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--audio", required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10.0, 60.0])
    parser.add_argument("--chunk-seconds", type=float, default=1.0)
    parser.add_argument("--norms", nargs="+", default=["frame", "sequence"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *arguments = json.loads(options.child)
        print(json.dumps(globals()[kind](options.tokenizer, *arguments)))
        return

    def child(kind: str, *arguments) -> dict[str, float]:
        command = [sys.executable, __file__, options.tokenizer, "--audio", options.audio]
        command += ["--child", json.dumps([kind, *arguments])]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])

    chunk = round(options.chunk_seconds * 25)
    with tempfile.TemporaryDirectory() as folder:
        codes = str(Path(folder) / "codes.npy")
        print("encode", child("encode", "sequence", codes, max(options.minutes), options.audio), flush=True)
        for norm in options.norms:
            peaks = []
            for minutes in sorted(options.minutes):
                figures = child("stream", norm, codes, minutes, chunk)
                peaks.append(figures["peak_mib"])
                print(f"{norm}: {minutes:g} minutes", json.dumps(figures), flush=True)
            print(f"{norm}: memory of the longest / the shortest: {peaks[-1] / peaks[0]:.3f}")
            deviation = child("compare", norm, codes, max(options.minutes), chunk)
            print(f"{norm}: streamed against segments at once", json.dumps(deviation), flush=True)


if __name__ == "__main__":
    main()
