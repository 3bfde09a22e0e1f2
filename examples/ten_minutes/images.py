from lightning import Trainer

from lora_lightning import Classifier, ConfusionReport, ImageFolderDataModule, LoRAFinetuning, image_backbone

data = ImageFolderDataModule("photos", val_fraction=0.2)
classes = len(data.classes_in("photos"))
model = Classifier(image_backbone("resnet18", "IMAGENET1K_V1", classes), num_classes=classes)
trainer = Trainer(max_epochs=5, log_every_n_steps=1, callbacks=[LoRAFinetuning(), ConfusionReport()])
trainer.fit(model, data)
trainer.test(model, data)
