"""Flow layers in the conventions of public repositories, as small as they can be."""

import torch
import torch.nn.functional as F
from torch import nn


def factors(channels):
    """P, L, U, sign and logarithm of the diagonal of a random rotation."""
    rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
    p, lower, upper = torch.linalg.lu(rotation)
    diagonal = upper.diagonal().clone()
    return p, lower, upper.triu(1), diagonal.sign(), diagonal.abs().log()


def hidden(channels, out, last):
    first = nn.Conv2d(channels, 8, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(inplace=True), last(8, out))


# forward gives (y, log-determinant), reverse x alone; the flag is a tensor (rosinality)


class ActNorm(nn.Module):
    def __init__(self, channels, logdet=True):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.logdet = logdet

    def forward(self, x):
        if self.initialized.item() == 0:
            with torch.no_grad():
                std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
                self.loc.copy_(-mean)
                self.scale.copy_(1 / (std + 1e-6))
                self.initialized.fill_(1)
        y = self.scale * (x + self.loc)
        return (y, x.shape[2] * x.shape[3] * self.scale.abs().log().sum()) if self.logdet else y

    def reverse(self, y):
        return y / self.scale - self.loc


class ShiftedActNorm(ActNorm):
    """Another map with the same parameters."""

    def forward(self, x):
        return self.scale * x + self.loc, x.shape[2] * x.shape[3] * self.scale.abs().log().sum()


class InvConv2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        self.weight = nn.Parameter(rotation[..., None, None])

    def forward(self, x):
        logdet = torch.slogdet(self.weight[..., 0, 0].double())[1].float()
        return F.conv2d(x, self.weight), x.shape[2] * x.shape[3] * logdet

    def reverse(self, y):
        return F.conv2d(y, self.weight[..., 0, 0].inverse()[..., None, None])


class InvConv2dLU(nn.Module):
    def __init__(self, channels):
        super().__init__()
        p, lower, upper, sign, log = factors(channels)
        mask = torch.ones(channels, channels)
        for name, value in {
            "w_p": p,
            "u_mask": mask.triu(1),
            "l_mask": mask.tril(-1),
            "s_sign": sign,
        }.items():
            self.register_buffer(name, value)
        self.register_buffer("l_eye", torch.eye(channels))
        self.w_l, self.w_s, self.w_u = nn.Parameter(lower), nn.Parameter(log), nn.Parameter(upper)

    def weight(self):
        diagonal = torch.diag(self.s_sign * self.w_s.exp())
        product = self.w_p @ (self.w_l * self.l_mask + self.l_eye) @ (self.w_u * self.u_mask + diagonal)
        return product[..., None, None]

    def forward(self, x):
        return F.conv2d(x, self.weight()), x.shape[2] * x.shape[3] * self.w_s.sum()

    def reverse(self, y):
        return F.conv2d(y, self.weight()[..., 0, 0].inverse()[..., None, None])


class ZeroConv2d(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3)
        self.scale = nn.Parameter(torch.zeros(1, out, 1, 1))

    def forward(self, x):
        return self.conv(F.pad(x, [1, 1, 1, 1], value=1)) * torch.exp(self.scale * 3)


class AffineCoupling(nn.Module):
    offset = 2

    def __init__(self, channels, affine=True):
        super().__init__()
        self.affine = affine
        self.net = hidden(channels // 2, channels if affine else channels // 2, ZeroConv2d)

    def parts(self, x):
        a, b = x.chunk(2, 1)
        if not self.affine:
            return a, b, 1, self.net(a), None
        raw, shift = self.net(a).chunk(2, 1)
        scale = torch.sigmoid(raw + self.offset)
        return a, b, scale, shift, scale.log().flatten(1).sum(1)

    def forward(self, x):
        a, b, scale, shift, logdet = self.parts(x)
        return torch.cat([a, (b + shift) * scale], 1), logdet

    def reverse(self, y):
        a, b, scale, shift, _ = self.parts(y)
        return torch.cat([a, b / scale - shift], 1)


class OtherCoupling(AffineCoupling):
    offset = 1


class Flow(nn.Module):
    def __init__(self, channels, affine=True, conv_lu=True):
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.invconv = (InvConv2dLU if conv_lu else InvConv2d)(channels)
        self.coupling = AffineCoupling(channels, affine)

    def forward(self, x):
        x, first = self.actnorm(x)
        x, second = self.invconv(x)
        x, third = self.coupling(x)
        return x, first + second if third is None else first + second + third

    def reverse(self, y):
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(y)))


class Reversible(nn.Module):
    """Steps one after another."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x):
        total = 0
        for step in self.steps:
            x, logdet = step(x)
            total = total + logdet
        return x, total

    def reverse(self, y):
        for step in reversed(self.steps):
            y = step.reverse(y)
        return y


# forward(input, logdet, reverse); the flag is a bool (chaiyujin, y0ast)


class ActNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.inited = False

    def forward(self, input, logdet=None, reverse=False):
        if not self.inited:
            with torch.no_grad():
                self.bias.copy_(-input.mean((0, 2, 3), keepdim=True))
                self.logs.copy_(-(input + self.bias).square().mean((0, 2, 3), keepdim=True).sqrt().log())
            self.inited = True
        own = self.logs.sum() * input.shape[2] * input.shape[3]
        if reverse:
            return input * torch.exp(-self.logs) - self.bias, None if logdet is None else logdet - own
        return (input + self.bias) * torch.exp(self.logs), None if logdet is None else logdet + own


class InvertibleConv1x1(nn.Module):
    def __init__(self, channels, factored=False, names=("l", "u")):
        super().__init__()
        self.w_shape, self.factored, self.names = [channels, channels], factored, names
        if not factored:
            self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
            return
        p, lower, upper, sign, log = factors(channels)
        self.register_buffer("p", p)
        self.register_buffer("sign_s", sign)
        self.l_mask, self.eye = torch.ones(channels, channels).tril(-1), torch.eye(channels)
        setattr(self, names[0], nn.Parameter(lower))
        setattr(self, names[1], nn.Parameter(upper))
        self.log_s = nn.Parameter(log)

    def forward(self, input, logdet=None, reverse=False):
        if self.factored:
            lower = getattr(self, self.names[0]) * self.l_mask + self.eye
            upper = getattr(self, self.names[1]) * self.l_mask.t() + torch.diag(
                self.sign_s * self.log_s.exp()
            )
            weight, own = self.p @ lower @ upper, self.log_s.sum()
        else:
            weight, own = self.weight, torch.slogdet(self.weight)[1]
        own = own * input.shape[2] * input.shape[3] * (-1 if reverse else 1)
        weight = torch.inverse(weight.double()).float() if reverse else weight
        y = F.conv2d(input, weight[..., None, None])
        return y, None if logdet is None else logdet + own


class FlowStep(nn.Module):
    def __init__(self, channels, coupling="affine", factored=False, names=("l", "u"), net="f"):
        super().__init__()
        self.flow_coupling, self.net = coupling, net
        self.actnorm = ActNorm2d(channels)
        self.invconv = InvertibleConv1x1(channels, factored, names)
        out = channels if coupling == "affine" else channels // 2
        setattr(self, net, hidden(channels // 2, out, lambda i, o: nn.Conv2d(i, o, 3, padding=1)))

    def permute(self, z, logdet, rev):
        return self.invconv(z, logdet, rev)

    def forward(self, input, logdet=None, reverse=False):
        return (self.reverse_flow if reverse else self.normal_flow)(input, logdet)

    def couple(self, z, logdet, sign):
        a, b = z.chunk(2, 1)
        h = getattr(self, self.net)(a)
        if self.flow_coupling == "additive":
            return torch.cat([a, b + sign * h], 1), logdet
        shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2.0)
        b = (b + shift) * scale if sign > 0 else b / scale - shift
        return torch.cat([a, b], 1), sign * scale.log().sum((1, 2, 3)) + logdet

    def normal_flow(self, input, logdet):
        z, logdet = self.actnorm(input, logdet)
        z, logdet = self.permute(z, logdet, False)
        return self.couple(z, logdet, 1)

    def reverse_flow(self, input, logdet):
        z, logdet = self.couple(input, logdet, -1)
        z, logdet = self.permute(z, logdet, True)
        return self.actnorm(z, logdet, reverse=True)


class FlowStepOfLambdas(FlowStep):
    """Copies of it share the convolution of the original."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.permute = lambda z, logdet, rev: self.invconv(z, logdet, rev)


# forward gives (z, [B]), inverse x alone (survae)


class Conv1x1(nn.Module):
    def __init__(self, channels, slogdet_cpu=True):
        super().__init__()
        self.slogdet_cpu = slogdet_cpu
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def mixed(self, x, weight):
        return torch.einsum("oc,bc...->bo...", weight, x).contiguous()

    def forward(self, x):
        logdet = torch.slogdet(self.weight.to("cpu") if self.slogdet_cpu else self.weight)[1]
        return self.mixed(x, self.weight), (logdet * x.shape[2:].numel()).expand([x.shape[0]]).to(x.device)

    def inverse(self, z):
        return self.mixed(z, self.weight.inverse())


class ActNormBijection(nn.Module):
    def __init__(self, channels, rank):
        super().__init__()
        self.register_buffer("initialized", torch.zeros(1))
        self.shift = nn.Parameter(torch.zeros(1, channels, *(1,) * rank))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, *(1,) * rank))

    def forward(self, x):
        if self.training and not self.initialized:
            self.initialized += 1
            dims = [0, *range(2, x.dim())]
            with torch.no_grad():
                self.shift.copy_(x.mean(dims, keepdim=True))
                self.log_scale.copy_((x.std(dims, keepdim=True) + 1e-6).log())
        logdet = (-self.log_scale).sum().expand([len(x)]) * x.shape[2:].numel()
        return (x - self.shift) * torch.exp(-self.log_scale), logdet

    def inverse(self, z):
        return self.shift + z * torch.exp(self.log_scale)


# sequences: WaveGlow and Glow-TTS


class Invertible1x1Conv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 1, bias=False)
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        rotation[:, 0] *= torch.det(rotation).sign()
        self.conv.weight.data = rotation[..., None]

    def forward(self, z, reverse=False):
        weight = self.conv.weight.squeeze()
        if reverse:
            if not hasattr(self, "W_inverse"):
                self.W_inverse = weight.detach().inverse()[..., None]
            return F.conv1d(z, self.W_inverse)
        return self.conv(z), z.shape[0] * z.shape[2] * torch.logdet(weight)


class InvConvNear(nn.Module):
    def __init__(self, channels, n_split=4, no_jacobian=False):
        super().__init__()
        self.n_split, self.no_jacobian = n_split, no_jacobian
        rotation = torch.linalg.qr(torch.randn(n_split, n_split))[0]
        rotation[:, 0] *= torch.det(rotation).sign()
        self.weight = nn.Parameter(rotation)

    def forward(self, x, x_mask=None, reverse=False, **others):
        b, c, t = x.shape
        n, groups = self.n_split, c // self.n_split
        lengths = x.new_full((b,), t) if x_mask is None else x_mask.sum([1, 2])
        x = x.view(b, 2, groups, n // 2, t).transpose(2, 3).reshape(b, n, groups, t)
        weight = self.weight
        if reverse:
            weight = self.weight_inv if hasattr(self, "weight_inv") else weight.inverse()
        logdet = None if reverse else torch.logdet(self.weight) * groups * lengths
        if self.no_jacobian and not reverse:
            logdet = 0
        y = (
            F.conv2d(x, weight[..., None, None])
            .view(b, 2, n // 2, groups, t)
            .transpose(2, 3)
            .reshape(b, c, t)
        )
        return y * (1 if x_mask is None else x_mask), logdet
