"""What the pages of tests are of."""

import innermax as im

HOSTILE = '</script><img src=x onerror="alert(1)">'
CLASSES = ["<u>nought</u>", "&amp;", *"23456789"]
THREAT = im.Linf(0.15)
ATTACKS = {"fgsm": im.FGSM(THREAT), 'pgd-4"><i>': im.PGD(THREAT, 4), "cw-4": im.CW(THREAT, 4)}
