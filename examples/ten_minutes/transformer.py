from lightning import Trainer
from own import Own, batches  # a LightningModule around a transformers classifier, and batches that are dicts

from lora_lightning import ConfusionReport, LoRAFinetuning

module = Own()
trainer = Trainer(max_epochs=2, log_every_n_steps=1, callbacks=[LoRAFinetuning(), ConfusionReport()])
trainer.fit(module, batches)
trainer.test(module, batches)
