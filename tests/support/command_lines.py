"""Options of train.py that switch on parts of timm's machinery, for tests on one process and on two."""
VIT = '--model test_vit --model-kwargs img_size=32 patch_size=8 depth=2'
NAFLEX = ('--model naflexvit_base_patch16_gap --model-kwargs embed_dim=32 depth=2 num_heads=2 patch_size=8 '
          'init_values=0.1 --naflex-loader --naflex-train-seq-lens 9 16 --naflex-max-seq-len 16')
JSD = '--aug-splits 3 --aa augmix-m3-w3 --jsd-loss'
DEIT = ('--model deit_tiny_distilled_patch16_224 --model-kwargs img_size=32 patch_size=8 embed_dim=32 depth=2 '
        'num_heads=2')
KD = '--kd-model-name local-dir:{teacher} --kd-distill-type '
SIZES = '--train-img-sizes 24 32 --train-batch-sizes 8 4'
AOT = '--torchcompile aot_eager'
