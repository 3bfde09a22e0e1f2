from lightning import Trainer

from lora_lightning import Classifier, ConfusionReport, LoRAFinetuning, MNISTDataModule, RichBoyNet

model = Classifier(RichBoyNet())
Trainer(max_epochs=1).fit(model, MNISTDataModule())
trainer = Trainer(max_epochs=1, callbacks=[LoRAFinetuning(rank=4), ConfusionReport()])
trainer.fit(model, MNISTDataModule(focus=[9]))
trainer.test(model, MNISTDataModule())
