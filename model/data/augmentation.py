from __future__ import annotations
from dataclasses import dataclass
import numpy as np, torch, soxr
@dataclass(frozen=True)
class AugmentationConfig: pass
@dataclass(frozen=True)
class SpecAugmentConfig: pass
@dataclass(frozen=True)
class FeatureAugmentConfig: pass
class WaveformAugmenter:
    def __init__(self, config, noises, seed=0): self.noises=noises
    def __call__(self, x, rng):
        if rng.random()<.4:
            f=rng.uniform(.9,1.12); x=soxr.resample(x,16000*f,16000,quality="LQ")
        if rng.random()<.15:
            n=int(16000*rng.uniform(.1,.4)); t=np.arange(n)/n
            ir=(rng.standard_normal(n)*np.exp(-t*rng.uniform(4,9))).astype(np.float32); ir*=rng.uniform(.02,.12)/1.0; ir[0]=1
            L=1<<int(np.ceil(np.log2(len(x)+n))); y=np.fft.irfft(np.fft.rfft(x,L)*np.fft.rfft(ir,L),L)[:len(x)]; x=y.astype(np.float32)
        if rng.random()<.12:
            y=soxr.resample(soxr.resample(x,16000,8000,quality="LQ"),8000,16000,quality="LQ"); x=y
        if rng.random()<.35:
            p=np.sqrt((x**2).mean())+1e-6; snr=rng.uniform(5,30)
            if self.noises and rng.random()<.7:
                z=self.noises[rng.integers(len(self.noises))]; o=rng.integers(len(z)); z=np.take(z,np.arange(o,o+len(x)),mode="wrap")
            else: z=rng.standard_normal(len(x)).astype(np.float32)
            q=np.sqrt((z**2).mean())+1e-9; x=x+z*(p/q*10**(-snr/20))
        g=10**(rng.uniform(-12,6)/20); m=np.abs(x).max()+1e-6
        return np.clip(x*min(g,.99/m),-1,1).astype(np.float32)
def concatenate_utterances(clips, rng, max_duration_s):
    parts=[]
    for i,(w,t) in enumerate(clips):
        if i: parts.append(np.zeros(int(16000*rng.uniform(.05,.4)),np.float32))
        parts.append(w)
    return np.concatenate(parts)[:int(max_duration_s*16000)], " ".join(t for _,t in clips if t)
def plan_concatenation(durations_s, groups, probability, max_duration_s, rng, max_parts=8):
    order=rng.permutation(len(durations_s)); out=[]; pools={}
    for i in order:
        i=int(i)
        short=durations_s[i]<1.5
        if rng.random()>(max(probability,.6) if short else probability): out.append([i]); continue
        key=(groups[i],short)
        g=pools.get(key)
        if g and sum(durations_s[j]+.4 for j in g[0])+durations_s[i]<=max_duration_s and len(g[0])<g[1]: g[0].append(i)
        else:
            if g: out.append(g[0])
            pools[key]=([i],int(rng.integers(2,9)) if short else int(rng.integers(2,4)))
    return out+[g[0] for g in pools.values()]
def spec_augment(f, lens, config, generator=None):
    B,M,T=f.shape; f=f.clone(); t=torch.arange(T)
    for _ in range(2):
        w=torch.rand(B)*20; s=torch.rand(B)*(M-w); m=torch.arange(M); k=(m>=s[:,None])&(m<(s+w)[:,None]); f=f.masked_fill(k[...,None],0.)
    for _ in range(3):
        w=torch.rand(B)*(lens*.07).clamp(max=30); s=torch.rand(B)*(lens-w); k=(t>=s[:,None])&(t<(s+w)[:,None]); f=f.masked_fill(k[:,None],0.)
    return f
def feature_augment(f, lens, config, generator=None):
    B,T,D=f.shape; t=torch.arange(T); f=f+torch.randn_like(f)*f.std()*.1
    for _ in range(3):
        w=torch.rand(B)*(lens*.07).clamp(max=15); s=torch.rand(B)*(lens-w); k=(t>=s[:,None])&(t<(s+w)[:,None]); f=f.masked_fill(k[...,None],0.)
    return f*(torch.rand(B,1,D)>.05)
