"""The recipes of audio-visual segmentation.

The paper's own recipe is not published. This one follows AVSegFormer and COMBO where they agree
(frames of 224x224, AdamW, frozen VGGish, dice or cross-entropy with AVSegFormer's mixing loss), and
trains the lite model, which has no pretrained parts, with more augmentation.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults

_AVSEGFORMER = "_avsegformer"


def model(variant: str) -> ConfigDict:
  """`avesformer_<variant>`, with the fields that ablations change."""
  config = ConfigDict({"name": f"avesformer_{variant}", "dtype": "float32", "remat": False})
  config.queries = "prompts"  # or "audio": the sound's token alone, no prompt query generator
  config.prompt_mode = "concat"  # the sound is a token beside the prompts; or "add" it to each
  config.stage_types = ("conv", "conv", "attn", "attn")  # attn everywhere: no early focus
  config.blind_to = "nothing"  # or "sound", "picture"
  config.freeze_backbone = False  # True: with `optimizer.freeze = ("^audio/", "^backbone/")`
  if variant == "lite":
    config.backbone = "resnet18"  # or "efficientnet_lite0", or "small", which is not pretrained
  return config


def avsbench(name: str, variant: str, *, epochs: int, clips: int, mask_loss: str) -> ConfigDict:
  """A complete experiment on a subset of AVSBench.

  Args:
    name: of the data set.
    variant: of the model: `r50`, `r18`, `pvt_v2_b2` or `lite`; `r50_avsegformer` is AVSegFormer's
      own recipe.
    epochs: over the training clips.
    clips: of training in the whole benchmark, from which the number of steps follows.
    mask_loss: of the task.
  """
  config = defaults.run()
  official = variant.endswith(_AVSEGFORMER)
  lite = variant == "lite"
  config.model = model(variant.removesuffix(_AVSEGFORMER))
  config.task = ConfigDict({"name": "audio_visual", "mask_loss": mask_loss, "mix_weight": 0.1})

  config.data = ConfigDict(defaults.loading())
  config.data.name = name
  config.data.root = "data/AVSBench"
  config.data.train_split = "train"
  config.data.options = ConfigDict({"embeddings": ""})  # a folder of effseg embed_audio
  config.data.augment = ConfigDict(
    {
      "size": (224, 224),
      "frames": 0,  # of a clip, drawn anew each time; 0: all
      "fit": "stretch",
      "ratio": (1.0, 1.0),
      "flip": 0.0,
      "photometric": False,
      "gain": 0.0,  # decibels
      "pitch": 0,  # mel bands that the sound is moved by at most
      "stripes": (0, 0),  # mel bands and time steps muted at most
    }
  )

  batch_size = 32 if lite else 8
  if official:
    batch_size = 4 if name == "avss" else 2
  steps = epochs * clips // batch_size
  config.train = ConfigDict(
    {"batch_size": batch_size, "num_steps": steps, "accumulate": 1, "average_decay": 0.0}
  )
  if official:
    config.optimizer = defaults.adamw(learning_rate=2e-5, weight_decay=0.01)
    config.schedule = ConfigDict({"name": "constant", "warmup_steps": 0, "warmup_ratio": 1.0})
  else:
    config.optimizer = defaults.adamw(learning_rate=1e-4, weight_decay=0.05)
    config.optimizer.clip_norm = 1.0
    config.optimizer.lr_rules = (("^backbone/", 0.1),)
    config.schedule = defaults.poly(warmup_steps=0, power=0.9)
  config.optimizer.freeze = ("^audio/",)  # VGGish stays as it was pretrained
  config.eval = evaluation(size=(224, 224), mask_size=(224, 224))
  config.eval.split = "val"
  config.eval.every = max(steps // 30, 1)
  if lite:
    from_scratch(config)
  return config


def from_scratch(config: ConfigDict) -> None:
  """Changes a recipe for a model without pretrained parts: everything is trained, and faster.

  A step sees one frame of each clip: what is learnt from a second of sound depends on the number
  of different sounds and pictures, and the frames of a clip are similar.
  """
  config.data.augment.frames = 1
  config.data.augment.fit = "random"
  config.data.augment.ratio = (0.8, 1.6)
  config.data.augment.flip = 0.5
  config.data.augment.photometric = True
  config.data.augment.gain = 6.0
  config.data.augment.pitch = 4
  config.data.augment.stripes = (6, 12)
  config.optimizer.learning_rate = 5e-4
  config.optimizer.lr_rules = ()
  config.optimizer.freeze = ()
  config.schedule.warmup_steps = 200
  config.train.average_decay = 0.998


def evaluation(size: tuple[int, int], mask_size: tuple[int, int]) -> ConfigDict:
  """Evaluation of whole clips.

  Args:
    size: rows and columns of the network's input.
    mask_size: rows and columns at which masks are compared, AVSBench's 224x224 for example.
  """
  return ConfigDict(
    {
      "size": size,
      "mask_size": mask_size,
      "clips_per_batch": 1,  # on which the reference's M_F depends; 4 in AVSBench's test.sh
      "batch_size": 8,
      "best_by": "M_J",
      "pictures": 4,
    }
  )
