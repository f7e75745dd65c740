"""A training step of Keras on TensorFlow in a process and an environment of its own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import keras
import numpy as np
import tensorflow as tf

from experiments.speed.keras_networks import load
from experiments.speed.worker import Made, work


def make(name: str, folder: Path, rate: float) -> Callable[[], Made]:
    """Load the problem; what is returned traces what `name` says."""
    threads = len(os.sched_getaffinity(0))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    model, builder = load(folder)
    trained = builder.given["params" if name.endswith("-full") else "trained"]
    variables = [builder.found[n][0] for n in trained]
    inputs, labels = (tf.constant(np.load(folder / f"{n}.npy")) for n in ("inputs", "labels"))

    def build() -> Made:
        optimizer = keras.optimizers.SGD(rate)
        optimizer.build(variables)

        def loss_of(inputs: Any, labels: Any) -> Any:
            logits = model(inputs, training=False)  # statistics are frozen
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            return tf.reduce_mean(losses)

        def step(inputs: Any, labels: Any) -> Any:
            # As keras.Model.train_step does, but that it may train some variables of a layer alone.
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([v.value for v in variables])
                loss = loss_of(inputs, labels)
            grads = tape.gradient(loss, [v.value for v in variables])
            optimizer.apply(grads, variables)
            return loss

        function = tf.function(
            loss_of if name.endswith("-forward") else step, jit_compile="xla" in name
        )
        return Made(
            lambda: function(inputs, labels).numpy(),
            lambda: builder.as_torch({n: builder.found[n][0].numpy() for n in trained}),
            lazy=True,
            about={"version": f"keras {keras.__version__}, tensorflow {tf.__version__}"},
        )

    return build


if __name__ == "__main__":
    work(make)
