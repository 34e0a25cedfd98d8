"""A server as a person starts it, asked through the OpenAI client."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny_families

from vlm_prune.pruning.pipeline import PrunedVLM
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.load import load
from vlm_prune.vlm.serving import as_content, image_embeds

BUDGET = 64
QUESTIONS = ["What color is the star?", "Is there a 7?", "How many circles are there?"]
OPTIONS = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"]
PATIENCE = 900


@pytest.fixture(scope="module")
def shown():
    draw = np.random.default_rng(1)
    return [tiny_families.picture(draw, (336, 336)) for _ in QUESTIONS]


@pytest.fixture(scope="module")
def loaded():
    return load("tiny")


class Server:
    def __init__(self, log, *options, model="tiny"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        line = [sys.executable, "-m", "vlm_prune.benchmarks.cli", "serve", model, *options]
        line += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", *OPTIONS]
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(line, stdout=out, stderr=out, env=environment)

    def get(self, path):
        import httpx

        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=60).text

    def client(self):
        import openai

        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="none", timeout=PATIENCE)

    def wait(self):
        import httpx

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.get("/health")
            except httpx.HTTPError:
                time.sleep(1)
            else:
                return self
        raise TimeoutError(self.log.read_text()[-3000:])

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(log, "--method", "zoo", "--budget", str(BUDGET), "--enable-mm-embeds")
    yield server.wait()
    server.stop()


def as_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def message(question, *images):
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def completion(client, messages, **options):
    return client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=16, **options
    )


def kept_tokens(server):
    """How many images there were, and how many of their tokens entered the model."""
    text = server.get("/metrics")
    values = [
        re.search(
            rf"^vlm_prune:image_tokens_kept_{name}(?:{{[^}}]*}})? ([\d.e+]+)$", text, re.MULTILINE
        )
        for name in ("count", "sum")
    ]
    return tuple(float(found[1]) if found else 0.0 for found in values)


def test_answers_are_those_of_the_hugging_face_route(server, loaded, shown):
    vlm = PrunedVLM(*loaded, build("zoo", budget=BUDGET))
    expected = [
        vlm.answer(picture, question, max_new_tokens=16, do_sample=False)
        for picture, question in zip(shown, QUESTIONS, strict=True)
    ]
    client, before = server.client(), kept_tokens(server)
    prompts = [message(q, as_url(p)) for p, q in zip(shown, QUESTIONS, strict=True)]
    for prompt, answer in zip(prompts, expected, strict=True):
        reply = completion(client, prompt)
        assert reply.choices[0].message.content.strip() == answer
        assert reply.usage.prompt_tokens < 2 * BUDGET
        parts = completion(client, prompt, stream=True)
        whole = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert whole.strip() == answer
    after = kept_tokens(server)
    images = 2 * len(prompts)
    assert after[0] - before[0] == images
    assert after[1] - before[1] == images * BUDGET


def test_embeddings_travel_over_http(server, loaded, shown):
    pruner = build("cdpruner", budget=BUDGET)
    model, processor = loaded
    (rows,) = image_embeds(model, [shown[0]], [QUESTIONS[0]], pruner, processor)
    expected = PrunedVLM(model, processor, pruner).answer(
        shown[0], QUESTIONS[0], max_new_tokens=16, do_sample=False
    )
    reply = completion(server.client(), message(QUESTIONS[0], *as_content(rows)))
    assert reply.choices[0].message.content.strip() == expected


def test_the_settings_are_printed(server):
    assert "vlm-prune: zoo keeps 64" in server.log.read_text()


def test_it_stops_with_requests_under_way(shown, tmp_path):
    server = Server(tmp_path / "log", "--budget", "0.1").wait()
    import openai

    client, failures = server.client(), []

    def ask():
        try:
            client.with_options(max_retries=0, timeout=20).chat.completions.create(
                model="tiny", messages=message(QUESTIONS[0], as_url(shown[0])),
                max_tokens=900, extra_body={"ignore_eos": True},
            )  # fmt: skip
        except openai.OpenAIError as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while "vllm:num_requests_running" not in (text := server.get("/metrics")) or not re.search(
        r"^vllm:num_requests_running\{[^}]*\} [1-9]", text, re.MULTILINE
    ):
        assert not failures and any(thread.is_alive() for thread in threads)
    # it answers nothing more, and ends when its clients have given up
    assert server.stop() in (0, -signal.SIGTERM)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(failures) == len(threads)


@pytest.mark.slow
def test_an_image_that_is_not_taken_is_the_client_s_error_and_the_server_goes_on(folders, tmp_path):
    """And one of fewer tokens than the budget keeps them all, where the number depends on the size."""
    import openai

    folder = str(folders("qwen2_5_vl"))
    options = ["--budget", "30", "--served-model-name", "tiny"]
    server = Server(tmp_path / "log", *options, model=folder).wait()
    client, draw = server.client(), np.random.default_rng(0)
    narrow, small, large = (
        message("What is it?", as_url(tiny_families.picture(draw, size)))
        for size in ((900, 1), (112, 112), (168, 168))
    )
    with pytest.raises(openai.BadRequestError, match="aspect ratio|Failed to apply"):
        completion(client, narrow)
    assert completion(client, small).choices
    assert kept_tokens(server) == (1, 16)
    assert completion(client, large).choices
    assert kept_tokens(server) == (2, 16 + 30)
    assert server.stop() in (0, -signal.SIGTERM)
